package libvirt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// Bounds and numbers of libvirt's RPC protocol. See its src/rpc/virnetprotocol.x and src/remote/remote_protocol.x.
const (
	headerLen = 28      // length, program, version, procedure, type, serial, status: 4 octets each
	maxPacket = 8 << 20 // libvirt's limit on a string is 4 MiB, which a domain's definition may reach

	programRemote    = 0x20008086
	programQEMU      = 0x20008087
	programKeepalive = 0x6b656570

	typeReply   = 1
	typeMessage = 2
)

// errMalformed says that what came is no libvirt.
var errMalformed = errors.New("libvirt sent what is not its protocol")

// wire is a connection to libvirt under go-libvirt. go-libvirt believes the length of each packet before it has looked at
// it, panics on one below the header's, and stops for ever on a reply that comes twice; so the wire looks first. It also
// knows before anybody else when the connection is over: dead is closed then, for the reason err.
type wire struct {
	net.Conn

	dead chan struct{}
	once sync.Once
	err  error // valid once dead is closed

	readerGone chan struct{} // closed when the reader, of which there is one, has been told
	readerOnce sync.Once

	// The reader's alone.
	header  [headerLen]byte
	have    int    // octets of header
	payload uint32 // octets of the present packet still to come
	serial  int32  // of the last reply
}

func newWire(c net.Conn) *wire {
	return &wire{Conn: c, dead: make(chan struct{}), readerGone: make(chan struct{})}
}

// fail ends the connection for a reason; the first one counts.
func (w *wire) fail(reason error) {
	w.once.Do(func() {
		w.err = reason
		close(w.dead)
		_ = w.Conn.Close() // nothing more is wanted of it
	})
}

// cause returns why the connection is over, nil while it is not.
func (w *wire) cause() error {
	select {
	case <-w.dead:
		return w.err
	default:
		return nil
	}
}

// Read passes on whole, well-formed packets only as far as they are known to be so. After an error it gives nothing but that.
func (w *wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if err == nil {
		err = w.inspect(p[:n])
	}
	if err == nil {
		return n, nil
	}
	if errors.Is(err, io.EOF) {
		err = errors.New("libvirt closed the connection")
	}
	w.fail(fmt.Errorf("reading from libvirt: %w", err)) // wrapped: go-libvirt would read again after some errors of package net
	w.readerOnce.Do(func() { close(w.readerGone) })
	return 0, w.cause()
}

// Write is the connection's, with its failures noted.
func (w *wire) Write(p []byte) (int, error) {
	n, err := w.Conn.Write(p)
	if err != nil {
		w.fail(fmt.Errorf("writing to libvirt: %w", err))
		return n, w.cause()
	}
	return n, nil
}

// inspect follows the packets through what has come.
func (w *wire) inspect(p []byte) error {
	for len(p) > 0 {
		if w.payload > 0 {
			n := min(uint32(len(p)), w.payload)
			w.payload -= n
			p = p[n:]
			continue
		}
		n := copy(w.header[w.have:], p)
		w.have += n
		p = p[n:]
		if w.have < headerLen {
			return w.checkLength()
		}
		if err := w.checkHeader(); err != nil {
			return err
		}
		w.payload, w.have = binary.BigEndian.Uint32(w.header[:])-headerLen, 0
	}
	return nil
}

// checkLength judges a header of which only the length may be there yet.
func (w *wire) checkLength() error {
	if w.have < 4 {
		return nil
	}
	if n := binary.BigEndian.Uint32(w.header[:]); n < headerLen || n > maxPacket {
		return fmt.Errorf("%w: a packet of %d octets", errMalformed, n)
	}
	return nil
}

func (w *wire) checkHeader() error {
	if err := w.checkLength(); err != nil {
		return err
	}
	program, kind := binary.BigEndian.Uint32(w.header[4:]), binary.BigEndian.Uint32(w.header[16:])
	if program != programRemote && program != programQEMU && program != programKeepalive {
		return fmt.Errorf("%w: program %#x", errMalformed, program)
	}
	switch kind {
	case typeMessage:
		return nil
	case typeReply:
		// One call is under way at a time, so replies come in order.
		serial := int32(binary.BigEndian.Uint32(w.header[20:]))
		if serial <= w.serial {
			return fmt.Errorf("%w: a second reply to call %d", errMalformed, serial)
		}
		w.serial = serial
		return nil
	}
	return fmt.Errorf("%w: a packet of type %d", errMalformed, kind)
}
