"""The commands. A token on the command line is hidden before anything slow is imported."""

from flowspec.cluster.argv import hide_token

hide_token()
