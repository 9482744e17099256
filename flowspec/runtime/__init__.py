"""What a sans-IO core is, and what runs one."""
