"""The control protocol: what a driver and its workers say to each other, as typed values.

``messages`` has one frozen class for each message, ``codec`` turns them into what a channel carries and back, and
checks what has come, and ``line`` sends and receives them.
"""
