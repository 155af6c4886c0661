"""What the verbs do: rooms combined, records out. Nothing here prints, and torch is imported in functions only.

A verb of the command line is one function here, and the same function in `import elmwood`. Its things may be names, digests or records;
`store` is a `Store`, a folder, or None for the default one; `progress` takes events and shows nothing unless the caller does.
"""
