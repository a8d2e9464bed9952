"""What a run tells about itself: log lines, metrics and their sinks. Knows no Ray."""
