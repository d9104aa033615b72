"""What ``draco bench`` and the suites in bench/ measure: decoders beside the rules people use instead."""
