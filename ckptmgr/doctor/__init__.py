"""What `ckptmgr doctor` looks at: one module per kind of finding, and one that runs them all."""
