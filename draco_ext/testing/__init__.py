"""What tests of users need, too: ranks as processes of this machine, and attacks."""
