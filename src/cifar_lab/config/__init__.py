"""From a command line to a frozen, fully checked RunConfig."""
