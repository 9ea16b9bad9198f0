package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"

	"keybroker/inject"
	"keybroker/internal/audit"
	"keybroker/internal/caller"
	"keybroker/internal/config"
	"keybroker/internal/policy"
)

const (
	// maxRefusing is how many connections may wait to be told why they get nothing.
	maxRefusing = 1024
	// strangersShare is the part of all connections, one in so many, that users whom policy does not name have together.
	strangersShare = 8
)

// conns are the open connections of tier 1, and whose they are. Each user has a number of them; those whom no entry of the policy
// names, and who can get nothing but refusals, share a small part, so that they cannot keep a service from its key.
type conns struct {
	callers *caller.Resolver
	limits  *config.Limits
	named   func(uid uint32) bool // whether an entry of the policy names this user

	mu        sync.Mutex
	open      map[net.Conn]admitted
	byUID     map[uint32]int        // of open, for each user
	strangers int                   // of open
	refusing  map[net.Conn]struct{} // that get nothing but a refusal
}

// admitted is whose a connection is, and whether policy did not name him when it was made.
type admitted struct {
	uid      uint32
	peer     *peer
	stranger bool
}

func newConns(callers *caller.Resolver, limits *config.Limits, named func(uid uint32) bool) *conns {
	return &conns{
		callers: callers, limits: limits, named: named,
		open: map[net.Conn]admitted{}, byUID: map[uint32]int{}, refusing: map[net.Conn]struct{}{},
	}
}

// peer is who the kernel says is at the other end of a connection, or why it gets nothing. What does not change while the
// connection lasts is written down once. It is used by the connection's own goroutine.
type peer struct {
	ask    func() (*caller.Caller, error) // on the Unix socket, until the first request
	who    *caller.Caller
	claims policy.Claims
	audit  *audit.Caller
	err    error
}

func (p *peer) is(who *caller.Caller, via string) {
	unit := who.Unit()
	p.who, p.audit = who, &audit.Caller{UID: who.UID, Unit: unit, PID: int32(who.PID)}
	p.claims = policy.Claims{UID: who.UID, Via: via, MatchUnit: who.MatchUnit, Unit: unit, NoUnit: who.NoUnit}
}

// known asks for the process and its unit when the connection's first request for a key has come. What connects and asks for
// nothing costs no more than its uid.
func (p *peer) known() error {
	if p.ask == nil {
		return p.err
	}
	who, err := p.ask()
	if p.ask, p.err = nil, err; err == nil {
		p.is(who, policy.ViaUnix)
	}
	return p.err
}

func (p *peer) close() {
	if p.who != nil {
		p.who.Close()
	}
}

type connPeer struct{}

// peerOf returns the peer of a request's connection, never nil.
func peerOf(ctx context.Context) *peer {
	if p, ok := ctx.Value(connPeer{}).(*peer); ok {
		return p
	}
	return &peer{err: errors.New("no caller")}
}

// identify asks the kernel whose a new connection is, once, when it is accepted. It runs between one accept and the next.
func (s *conns) identify(ctx context.Context, c net.Conn) context.Context {
	p := &peer{}
	uid, err := s.ask(c, p)
	if err == nil {
		err = s.admit(c, uid, p)
	}
	if err != nil {
		p = &peer{err: err}
		s.linger(c)
	}
	return context.WithValue(ctx, connPeer{}, p)
}

func (s *conns) ask(c net.Conn, p *peer) (uid uint32, err error) {
	switch c := c.(type) {
	case *net.UnixConn:
		p.ask = func() (*caller.Caller, error) { return s.callers.FromUnix(c) }
		return caller.UnixUID(c)
	case *net.TCPConn:
		who, err := s.callers.FromTCP(c)
		if err != nil {
			return 0, err
		}
		p.is(who, policy.ViaTCP)
		return who.UID, nil
	}
	return 0, fmt.Errorf("a connection of type %T", c)
}

// admit counts a connection, or says which of the limits it exceeds.
func (s *conns) admit(c net.Conn, uid uint32, p *peer) error {
	stranger := !s.named(uid)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.byUID[uid] >= s.limits.ConnectionsPerCaller:
		return refusal(inject.CodeBusy, "this user has %d connections open already", s.byUID[uid])
	case len(s.open) >= s.limits.Connections:
		return refusal(inject.CodeBusy, "all users together have %d connections open already", len(s.open))
	case stranger && s.strangers >= max(1, s.limits.Connections/strangersShare):
		return refusal(inject.CodeBusy, "users whom no [[service]] entry names have %d connections open already", s.strangers)
	}
	s.open[c] = admitted{uid, p, stranger}
	s.byUID[uid]++
	if stranger {
		s.strangers++
	}
	return nil
}

// linger keeps a connection that gets nothing open until its first request is answered with the reason. When there are many
// such it is closed instead: whoever opens them faster than they run into their deadline must not use up the descriptors.
func (s *conns) linger(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.refusing) >= maxRefusing {
		c.Close()
		return
	}
	s.refusing[c] = struct{}{}
}

// closed is told of every connection's states by net/http, and forgets those that are closed.
func (s *conns) closed(c net.Conn, state http.ConnState) {
	if state != http.StateClosed && state != http.StateHijacked {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.refusing, c)
	a, ok := s.open[c]
	if !ok {
		return
	}
	a.peer.close()
	delete(s.open, c)
	if a.stranger {
		s.strangers--
	}
	if s.byUID[a.uid]--; s.byUID[a.uid] == 0 {
		delete(s.byUID, a.uid)
	}
}
