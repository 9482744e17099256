"""The engines, which run a head with its stages behind one interface, wherever these are."""
