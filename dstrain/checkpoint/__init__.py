"""Stage, verify, publish, find and restore training state at any world size and ZeRO stage. No pickle."""
