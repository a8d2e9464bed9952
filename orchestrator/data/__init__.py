"""Token files, stateless sampling and tokenizers. Knows no Ray."""
