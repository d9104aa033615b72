"""The measurements of ``draco bench`` and of the suites in bench/: decoders compared with robust averages."""
