"""Files that requests name: below the root, uploaded, downloaded. Knows no queue and no job.

`library` finds and lists what is on this machine, `sources` finds and fetches what one request names; `uploads`
and `downloads` receive files, `content_store` keeps them for their owners, `public_http` reaches hosts for
`downloads`. `reading` compares what is read with the hash in its name, `process_folder` holds what is not
finished, `durable` makes writes outlast a power failure. `inspection` says what a file does to a model.
"""
