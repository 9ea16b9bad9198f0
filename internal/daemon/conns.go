package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

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
	strangersShare = config.MinConnections

	// Connections of the admin socket, and as many of the hook's.
	localConns     = 128
	localPerCaller = 32 // of the admin socket
	localOthers    = 96 // of users other than root together
	localRefusing  = 64
)

// conns are the open connections of one kind of door, and whose they are. Each user has a number of them; strangers share a part,
// so that they cannot keep the others from theirs. On tier 1 these are users whom no entry of the policy names, and who can get
// nothing but refusals.
type conns struct {
	callers *caller.Resolver
	limits  *config.Limits
	named   func(uid uint32) bool // whether this user is no stranger
	share   func(all int) int     // the strangers' part of all connections
	them    string                // what refusals call strangers
	most    int                   // of refusing
	keep    func(admitted) bool   // whether a connection is let finish when the broker stops

	mu        sync.Mutex
	open      map[net.Conn]admitted
	byUID     map[uint32]int        // of open, for each user
	strangers int                   // of open
	refusing  map[net.Conn]struct{} // that get nothing but a refusal
	ending    atomic.Bool           // the broker stops; set with mu held
}

// admitted is whose a connection is, and whether policy did not name him when it was made.
type admitted struct {
	uid      uint32
	peer     *peer
	stranger bool
}

// newConns are the connections of tier 1.
func newConns(callers *caller.Resolver, limits *config.Limits, named func(uid uint32) bool) *conns {
	return &conns{
		callers: callers, limits: limits, named: named, them: "users whom no [[service]] entry names", most: maxRefusing,
		share: func(all int) int { return all / strangersShare },
		keep:  func(a admitted) bool { return !a.stranger || named(a.uid) },
		open:  map[net.Conn]admitted{}, byUID: map[uint32]int{}, refusing: map[net.Conn]struct{}{},
	}
}

// newLocalConns are the connections of a socket of this host's administrators, with so many of each user. Root always finds a place.
func newLocalConns(perCaller int) *conns {
	c := newConns(nil, &config.Limits{Connections: localConns, ConnectionsPerCaller: perCaller}, func(uid uint32) bool { return uid == 0 })
	c.share, c.them, c.most = func(int) int { return localOthers }, "users other than root", localRefusing
	c.keep = func(a admitted) bool { return a.peer.changes.Load() }
	return c
}

// peer is who the kernel says is at the other end of a connection, or why it gets nothing. What does not change while the
// connection lasts is written down once. It is used by the connection's own goroutine.
type peer struct {
	ask    func() (*caller.Caller, error) // on the Unix socket, until the first request
	who    *caller.Caller
	claims policy.Claims
	audit  *audit.Caller
	err    error

	changes atomic.Bool  // it asked for a change, and may
	state   atomic.Int32 // connNew, connBusy or connIdle
}

const (
	connNew  = iota // nothing was asked yet
	connBusy        // a request is being answered
	connIdle        // none is
)

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
	case stranger && s.strangers >= s.share(s.limits.Connections):
		return refusal(inject.CodeBusy, "%s have %d connections open already", s.them, s.strangers)
	}
	a := admitted{uid, p, stranger}
	if s.ending.Load() && !s.keep(a) {
		return refusal(inject.CodeBusy, "the broker stops")
	}
	s.open[c] = a
	s.byUID[uid]++
	if stranger {
		s.strangers++
	}
	return nil
}

// served lets h answer those whose connection is admitted, and tells the others why not.
func served(h http.Handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		p := peerOf(r.Context())
		if p.err == nil {
			h.ServeHTTP(w, r)
			return
		}
		refused := inject.Refusal{Code: inject.CodeUnknownPeer, Reason: p.err.Error()}
		errors.As(p.err, &refused)
		w.Header().Set("Connection", "close")
		answerRefusal(w, refused)
	}
}

// finishing lets h answer, and marks the connection as busy meanwhile. A request that the broker's end meets is the last of its
// connection, and is answered although finish has closed the half that is read, which net/http takes for a caller who is gone.
func (s *conns) finishing(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p := peerOf(r.Context())
		p.state.Store(connBusy)
		defer p.state.Store(connIdle)
		if s.ending.Load() {
			w.Header().Set("Connection", "close")
			r = r.WithContext(context.WithoutCancel(r.Context()))
		}
		h.ServeHTTP(w, r)
	})
}

// linger keeps a connection that gets nothing open until its first request is answered with the reason. When there are many
// such it is closed instead: whoever opens them faster than they run into their deadline must not use up the descriptors.
func (s *conns) linger(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.refusing) >= s.most || s.ending.Load() {
		c.Close()
		return
	}
	s.refusing[c] = struct{}{}
}

// finish ends all connections without losing a request, when no more come; when ctx ends first, it closes what is left. What gets
// nothing that is worth waiting for is closed at once: how long that takes is up to its caller.
func (s *conns) finish(ctx context.Context) {
	s.end()
	fresh := time.Now().Add(freshTime)
	tick := time.NewTicker(finishPoll)
	defer tick.Stop()
	for s.hangUp(time.Now().After(fresh)) > 0 {
		select {
		case <-ctx.Done():
			s.closeAll()
			return
		case <-tick.C:
		}
	}
}

func (s *conns) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ending.Store(true)
	for c := range s.refusing {
		c.Close()
	}
	for c, a := range s.open {
		if !s.keep(a) {
			c.Close()
		}
	}
}

func (s *conns) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.open {
		c.Close()
	}
}

// hangUp closes the half that is read of those connections that are idle, and of those that never asked if they had their time. What
// has arrived there already is still read and answered; what is sent later fails at the sender's, who knows that nobody got it. It
// returns how many connections are left.
func (s *conns) hangUp(all bool) (left int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c, a := range s.open {
		if state := a.peer.state.Load(); state == connBusy || state == connNew && !all {
			continue
		}
		if c, ok := c.(interface{ CloseRead() error }); ok {
			c.CloseRead()
		}
	}
	return len(s.open)
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
