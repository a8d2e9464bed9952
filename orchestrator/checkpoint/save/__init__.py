"""From the live state to node memory and storage, while training goes on."""
