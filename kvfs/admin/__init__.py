"""What an administrator asks of a pool: questions, answers, and the functions between them.

Layer: L5.

- `messages` are the questions and answers; they are also what travels over the control socket.
- `operations` answer them for an open pool; the owner's control server and offline commands call
  the same functions.
- `raw` reads devices that nobody needs to have open.

This package imports nothing, so that a command that only talks to an owner starts quickly.
"""
