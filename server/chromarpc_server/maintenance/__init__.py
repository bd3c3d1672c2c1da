"""`chromarpc-server store`: looks after what lies below the data folder, without torch and without a server.

`command` is the front door; `check`, `backup`, `restore`, `repair` and `forget` do one thing each. What they find
and do goes into a `Report`; what keeps them from it is `CannotBeDone`.
"""
