"""Counts visits in Redis: the web half of a pair of pods."""

import os

import redis
from flask import Flask

app = Flask(__name__)
store = redis.Redis(
    host=os.environ.get("REDIS_HOST", "127.0.0.1"),
    port=int(os.environ.get("REDIS_PORT", "6379")),
    socket_timeout=20,
)


@app.get("/")
def count():
    return f"visits: {store.incr('visits')}\n"


@app.get("/healthy")
def healthy():
    return "yes\n"


if __name__ == "__main__":
    app.run(host="0.0.0.0", port=int(os.environ.get("PORT", "8000")))
