"""What travels between server and client, and its checks; nothing of Flower, which carries it."""
