"""From storage, node memory or other programs' files to the live state."""
