// Package caller is who is at the other end of a local connection, by the kernel's word: the uid, and the cgroup, which is
// the systemd unit.
//
// On a Unix socket the kernel has kept the peer's credentials and a handle on its process since it connected. On TCP over
// loopback it is asked for the client's socket, once when the connection is accepted and again right before the answer: a
// socket has the uid and cgroup of the process that made it, a port may have passed to somebody else in between. What the
// kernel does not know is a refusal, never a guess.
package caller
