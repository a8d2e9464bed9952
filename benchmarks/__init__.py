"""Side-by-side measurements. Every module in here is one benchmark; nothing of the product imports them."""
