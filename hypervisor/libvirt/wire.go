package libvirt

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Bounds and numbers of libvirt's RPC protocol. See its src/rpc/virnetprotocol.x and src/remote/remote_protocol.x.
const (
	headerLen = 28      // length, program, version, procedure, type, serial, status: 4 octets each
	maxPacket = 8 << 20 // libvirt's limit on a string is 4 MiB, which a domain's definition may reach

	programRemote    = 0x20008086
	programKeepalive = 0x6b656570

	typeReply   = 1
	typeMessage = 2

	statusOK = 0

	procOpen = 1
)

// shapes says how the results of the procedures that we call, and the events that we subscribe to, are put together: i is an
// integer or enumeration of 4 octets, u a UUID, s a string, and [...] an array. An error's is errorShape.
var shapes = map[uint32]string{
	procOpen: "",
	14:       "s",      // DOMAIN_GET_XML_DESC
	24:       "sui",    // DOMAIN_LOOKUP_BY_UUID
	66:       "[i]",    // AUTH_LIST
	70:       "i",      // AUTH_POLKIT
	157:      "ii",     // CONNECT_GET_LIB_VERSION
	212:      "ii",     // DOMAIN_GET_STATE
	273:      "[sui]i", // CONNECT_LIST_ALL_DOMAINS
	316:      "i",      // CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY
	318:      "isuiii", // DOMAIN_EVENT_CALLBACK_LIFECYCLE
	319:      "isui",   // DOMAIN_EVENT_CALLBACK_REBOOT
	333:      "isuis",  // DOMAIN_EVENT_CALLBACK_DEVICE_REMOVED
}

// errorShape is as much of an error as is read: code, domain, that there is a message, the message.
const errorShape = "iiis"

// errMalformed says that what came is no libvirt.
var errMalformed = errors.New("libvirt sent what is not its protocol")

// wire is a connection to libvirt under go-libvirt. go-libvirt believes each length before it has looked at it, panics on a
// packet below the header's, and stops for ever on a reply that comes twice; so the wire passes on only whole packets that
// are what they should be. It also knows before anybody else when the connection is over: dead is closed then, for the reason err.
type wire struct {
	net.Conn

	dead chan struct{}
	once sync.Once
	err  error // valid once dead is closed

	opened     chan struct{} // closed when go-libvirt's opening call has returned
	readerGone chan struct{} // closed when the reader, of which there is one, has had its error
	readerOnce sync.Once

	// The reader's alone.
	in      *bufio.Reader
	packet  []byte // what is left to pass on of the present packet
	serial  int32  // of the last reply
	opening bool   // the reply that ends go-libvirt's opening call has been passed on
}

func newWire(c net.Conn) *wire {
	return &wire{Conn: c, in: bufio.NewReader(c), dead: make(chan struct{}), opened: make(chan struct{}), readerGone: make(chan struct{})}
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

// Read passes on packets that are known to be sound, and after the first error nothing but that.
func (w *wire) Read(p []byte) (int, error) {
	if len(w.packet) == 0 {
		err := w.cause()
		var packet []byte
		if err == nil {
			packet, err = w.next()
		}
		if err != nil {
			return 0, w.end(err)
		}
		w.packet = packet
	}
	n := copy(p, w.packet)
	w.packet = w.packet[n:]
	return n, nil
}

// end tells the reader that the connection is over.
func (w *wire) end(err error) error {
	if errors.Is(err, io.EOF) {
		err = errors.New("libvirt closed the connection")
	}
	w.fail(fmt.Errorf("reading from libvirt: %w", err)) // wrapped: go-libvirt would read again after some errors of package net
	if w.opening {
		// go-libvirt notes after its opening call, and without a lock, that it is connected.
		select {
		case <-w.opened:
		case <-time.After(time.Second):
		}
	}
	w.readerOnce.Do(func() { close(w.readerGone) })
	return w.cause()
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

// next reads one packet whole. A packet's length is no reason to hold that much memory before its octets are there.
func (w *wire) next() ([]byte, error) {
	var head [headerLen]byte
	if _, err := io.ReadFull(w.in, head[:4]); err != nil {
		return nil, err
	}
	length := binary.BigEndian.Uint32(head[:])
	if length < headerLen || length > maxPacket {
		return nil, fmt.Errorf("%w: a packet of %d octets", errMalformed, length)
	}
	if _, err := io.ReadFull(w.in, head[4:]); err != nil {
		return nil, err
	}
	if err := w.checkHeader(head[4:]); err != nil {
		return nil, err
	}
	packet := bytes.NewBuffer(head[:])
	if _, err := io.CopyN(packet, w.in, int64(length-headerLen)); err != nil {
		return nil, err
	}
	return packet.Bytes(), checkPayload(packet.Bytes())
}

// checkHeader judges a header without its length.
func (w *wire) checkHeader(head []byte) error {
	program, kind := binary.BigEndian.Uint32(head), binary.BigEndian.Uint32(head[12:])
	if program != programRemote && program != programKeepalive {
		return fmt.Errorf("%w: program %#x", errMalformed, program)
	}
	switch kind {
	case typeMessage:
		return nil
	case typeReply:
		// One call is under way at a time, so replies come in order.
		serial := int32(binary.BigEndian.Uint32(head[16:]))
		if serial <= w.serial {
			return fmt.Errorf("%w: a second reply to call %d", errMalformed, serial)
		}
		w.serial = serial
		w.opening = w.opening || binary.BigEndian.Uint32(head[8:]) == procOpen && binary.BigEndian.Uint32(head[20:]) == statusOK
		return nil
	}
	return fmt.Errorf("%w: a packet of type %d", errMalformed, kind)
}

// checkPayload judges what a packet carries, as far as its procedure is one of ours; go-libvirt skips the others.
func checkPayload(packet []byte) error {
	if binary.BigEndian.Uint32(packet[4:]) != programRemote {
		return nil
	}
	proc := binary.BigEndian.Uint32(packet[12:])
	shape, ours := shapes[proc]
	if binary.BigEndian.Uint32(packet[24:]) != statusOK {
		shape, ours = errorShape, true
	}
	if !ours {
		return nil
	}
	if _, ok := skip(packet[headerLen:], shape); !ok {
		return fmt.Errorf("%w: not the result of procedure %d", errMalformed, proc)
	}
	return nil
}

// skip returns what follows a value of this shape.
func skip(data []byte, shape string) (rest []byte, ok bool) {
	for i := 0; i < len(shape); i++ {
		n := 4
		switch shape[i] {
		case 'u':
			n = 16
		case 's':
			if len(data) < 4 {
				return nil, false
			}
			n += (int(binary.BigEndian.Uint32(data)) + 3) &^ 3
		case '[':
			inner := shape[i+1 : i+bytes.IndexByte([]byte(shape[i:]), ']')]
			if data, ok = skipArray(data, inner); !ok {
				return nil, false
			}
			i, n = i+len(inner)+1, 0
		}
		if n > len(data) {
			return nil, false
		}
		data = data[n:]
	}
	return data, true
}

func skipArray(data []byte, inner string) (rest []byte, ok bool) {
	if len(data) < 4 {
		return nil, false
	}
	n := binary.BigEndian.Uint32(data)
	data = data[4:]
	for range n { // each takes 4 octets at least, so it ends with the data
		if data, ok = skip(data, inner); !ok {
			return nil, false
		}
	}
	return data, true
}
