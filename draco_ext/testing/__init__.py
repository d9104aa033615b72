"""Tools for tests, also for yours: ranks as processes or threads of this machine, and attacks."""
