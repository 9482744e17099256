"""The EAGLE-1 and EAGLE-2 drafter."""
