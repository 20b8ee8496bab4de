"""The sidecar: takes sealed snapshots, streams them to the store, commits, resumes."""
