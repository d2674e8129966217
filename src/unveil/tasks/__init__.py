"""What the command line can do, each as a frozen dataclass of options and a function that returns plain values."""
