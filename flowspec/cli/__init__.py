"""The commands. A token on the command line is hidden before anything slow is imported."""

from flowspec.cli.argv import hide_token

hide_token()
