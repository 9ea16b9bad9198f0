package libvirt

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	golibvirt "github.com/digitalocean/go-libvirt"

	"keybroker/hypervisor"
)

// Procedures of libvirt's remote protocol that the client uses.
const (
	procXML        = 14
	procLookupName = 23
	procLookup     = 24
	procAuthList   = 66
	procLibVersion = 157
	procState      = 212
	procListAll    = 273
	procRegister   = 316
	procLifecycle  = 318
	procReboot     = 319
	procUnplugged  = 333
)

// server speaks enough of libvirt's protocol to misbehave in every way that a real one cannot be made to.
type server struct {
	t    *testing.T
	path string

	mu       sync.Mutex
	domains  []fakeDomain
	calls    []uint32                         // procedures in the order in which they came
	answer   func(s *session, c request) bool // says whether it has dealt with the call; nil: never
	sessions []*session
	changed  chan struct{} // closed and replaced at each call
}

type fakeDomain struct {
	name, uuid string
	id         int32
	state      golibvirt.DomainState
	xml        string
}

type session struct {
	net.Conn
	write  sync.Mutex
	events map[uint32]int32 // event ID to callback ID
}

type request struct {
	proc, serial uint32
	args         []byte
}

func newServer(t *testing.T, domains ...fakeDomain) *server {
	s := &server{t: t, path: filepath.Join(t.TempDir(), "libvirt-sock-ro"), domains: domains, changed: make(chan struct{})}
	l, err := net.Listen("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close(); s.hangUp() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n := &session{Conn: c, events: map[uint32]int32{}}
			s.mu.Lock()
			s.sessions = append(s.sessions, n)
			s.mu.Unlock()
			go s.serve(n)
		}
	}()
	return s
}

// client returns one of s with a short patience.
func (s *server) client(cfg Config) *Client {
	if cfg.Sockets == nil {
		cfg.Sockets = []string{s.path}
	}
	if cfg.RunDir == "" {
		cfg.RunDir = filepath.Dir(s.path)
	}
	c, err := New(cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(c.Close)
	return c
}

// hangUp closes every connection.
func (s *server) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.sessions {
		n.Close()
	}
	s.sessions = nil
}

func (s *server) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *server) serve(n *session) {
	defer n.Close()
	for {
		var head [headerLen]byte
		if _, err := io.ReadFull(n, head[:]); err != nil {
			return
		}
		c := request{binary.BigEndian.Uint32(head[12:]), binary.BigEndian.Uint32(head[20:]), make([]byte, binary.BigEndian.Uint32(head[:])-headerLen)}
		if _, err := io.ReadFull(n, c.args); err != nil {
			return
		}
		s.mu.Lock()
		s.calls = append(s.calls, c.proc)
		answer := s.answer
		close(s.changed)
		s.changed = make(chan struct{})
		s.mu.Unlock()
		if answer == nil || !answer(n, c) {
			s.reply(n, c)
		}
	}
}

// awaitCalls waits until proc has been called n times.
func (s *server) awaitCalls(proc uint32, n int) {
	for {
		s.mu.Lock()
		had, changed := 0, s.changed
		for _, c := range s.calls {
			if c == proc {
				had++
			}
		}
		s.mu.Unlock()
		if had >= n {
			return
		}
		<-changed
	}
}

func (s *server) reply(n *session, c request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch c.proc {
	case procAuthList:
		n.reply(c, words(1, 0))
	case procOpen:
		n.reply(c, nil)
	case procLibVersion:
		n.reply(c, words(0, 9000000))
	case procRegister:
		id := binary.BigEndian.Uint32(c.args)
		n.events[id] = int32(id) + 1
		n.reply(c, words(id+1))
	case procListAll:
		body, active := words(0), uint32(0)
		for _, d := range s.domains {
			if d.state != golibvirt.DomainShutoff {
				body, active = append(body, d.encode()...), active+1
			}
		}
		binary.BigEndian.PutUint32(body, active)
		n.reply(c, append(body, words(active)...))
	case procLookup, procLookupName, procXML, procState:
		i := slices.IndexFunc(s.domains, func(d fakeDomain) bool {
			return containsUUID(c.args, d.uuid) || c.proc == procLookupName && slices.Equal(c.args, xdrString(d.name))
		})
		if i < 0 {
			n.refuse(c, uint32(golibvirt.ErrNoDomain), "Domain not found")
			return
		}
		d := s.domains[i]
		n.reply(c, map[uint32][]byte{procLookup: d.encode(), procLookupName: d.encode(), procXML: xdrString(d.xml), procState: words(uint32(d.state), 0)}[c.proc])
	default:
		n.refuse(c, uint32(golibvirt.ErrNoSupport), "unknown procedure")
	}
}

// emit sends an event to whoever has subscribed.
func (s *server) emit(d fakeDomain, event, detail uint32) { s.send(0, procLifecycle, d, event, detail) }

func (s *server) reboot(d fakeDomain) { s.send(1, procReboot, d) }

func (s *server) unplug(d fakeDomain, device string) {
	s.sendRaw(15, procUnplugged, d, xdrString(device))
}

func (s *server) send(id, proc uint32, d fakeDomain, more ...uint32) {
	s.sendRaw(id, proc, d, words(more...))
}

func (s *server) sendRaw(id, proc uint32, d fakeDomain, more []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.sessions {
		if callback, ok := n.events[id]; ok {
			n.packet(programRemote, proc, typeMessage, 0, 0, slices.Concat(words(uint32(callback)), d.encode(), more))
		}
	}
}

func (n *session) reply(c request, body []byte) {
	n.packet(programRemote, c.proc, typeReply, c.serial, 0, body)
}

func (n *session) refuse(c request, code uint32, message string) {
	n.packet(programRemote, c.proc, typeReply, c.serial, 1, slices.Concat(words(code, 10, 1), xdrString(message), words(2)))
}

func (n *session) packet(program, proc, kind, serial, status uint32, body []byte) {
	n.raw(append(words(headerLen+uint32(len(body)), program, 1, proc, kind, serial, status), body...))
}

func (n *session) raw(data []byte) {
	n.write.Lock()
	defer n.write.Unlock()
	_, _ = n.Write(data) // a client that has gone is what some tests want
}

func (d fakeDomain) encode() []byte {
	raw, err := hypervisor.UUIDBytes(d.uuid)
	if err != nil {
		panic(err)
	}
	return slices.Concat(xdrString(d.name), raw[:], words(uint32(d.id)))
}

func containsUUID(args []byte, uuid string) bool {
	raw, err := hypervisor.UUIDBytes(uuid)
	if err != nil {
		panic(err)
	}
	for i := 0; i+16 <= len(args); i += 4 {
		if slices.Equal(args[i:i+16], raw[:]) {
			return true
		}
	}
	return false
}

func words(n ...uint32) []byte {
	var b []byte
	for _, w := range n {
		b = binary.BigEndian.AppendUint32(b, w)
	}
	return b
}

func xdrString(s string) []byte {
	b := append(words(uint32(len(s))), s...)
	return append(b, make([]byte, (4-len(s)%4)%4)...)
}

// domain makes a running domain with a number's name, UUID, ID and vsock address.
func domain(number int, cid uint32) fakeDomain {
	d := fakeDomain{name: fmt.Sprintf("web%d", number), uuid: fmt.Sprintf("00000000-0000-4000-8000-%012d", number), id: int32(number), state: golibvirt.DomainRunning}
	device := ""
	if cid != 0 {
		device = fmt.Sprintf("<vsock model='virtio'><cid auto='yes' address='%d'/></vsock>", cid)
	}
	d.xml = fmt.Sprintf(`<domain type='kvm' id='%d'><name>%s</name><uuid>%s</uuid><metadata><k:domain xmlns:k="%s"><k:key name="disk"/></k:domain></metadata><devices>%s</devices></domain>`,
		number, d.name, d.uuid, hypervisor.Namespace, device)
	return d
}
