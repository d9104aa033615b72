"""For tests of your own, too: ranks as processes or threads of this machine, and attacks."""
