"""The CPU kernel: C++, compiled at first use for the machine it runs on."""
