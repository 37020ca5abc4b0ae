"""The gateway: two doors, one journey. It validates, tokenizes, routes and streams; it never imports torch."""
