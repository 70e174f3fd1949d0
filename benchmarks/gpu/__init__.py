"""What to run on a machine with a GPU and nothing but torch and small libraries; each part takes under ten minutes."""
