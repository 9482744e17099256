"""What work and messages cost on devices and links that are described by profiles."""
