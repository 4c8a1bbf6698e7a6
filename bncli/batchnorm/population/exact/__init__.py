"""What makes measuring layer by layer cheap: which layer depends on which, and where a pass may start."""
