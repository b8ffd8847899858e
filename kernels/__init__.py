"""Device kernels compiled at run time, one folder per compiler."""
