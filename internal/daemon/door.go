package daemon

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxHead    = 8 << 10  // octets of a request, which is all header
	maxDiscard = 64 << 10 // of what comes behind a request that is refused
	// discardTime is how long a caller may take to read why its request was refused before all of it was read.
	discardTime = 500 * time.Millisecond
	// acceptPause is the time between attempts while the process or the machine has no descriptor or memory for a connection.
	acceptPause = 100 * time.Millisecond
)

// door serves tier 1: HTTP/1.1 without bodies, on connections that stay open. Requests are read with net/http's parser. The loop
// around it is the door's own, for http.Server does much for every request that these have no use for, watching the connection
// while it is answered above all, and that is a third of what a key costs.
type door struct {
	route http.HandlerFunc
	conns *conns
	log   *slog.Logger

	headTime  time.Duration // for the whole of a request, from its first octet
	idleTime  time.Duration // between requests
	writeTime time.Duration // for an answer to be taken

	date atomic.Pointer[dateLine]
}

// Serve accepts connections until the listener is closed, and returns why it ended.
func (d *door) Serve(l net.Listener) error {
	for {
		c, err := l.Accept()
		switch {
		case err == nil:
			go d.serve(d.conns.identify(context.Background(), c), c)
		case isShortage(err):
			d.log.Warn("accepting a connection", "err", err)
			time.Sleep(acceptPause)
		default:
			return err
		}
	}
}

func isShortage(err error) bool {
	for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// line is one connection of a door.
type line struct {
	*door
	net.Conn
	peer *peer
	head io.LimitedReader // what is left of the request that is being read
	in   *bufio.Reader
	out  bytes.Buffer
}

func (d *door) serve(ctx context.Context, c net.Conn) {
	l := &line{door: d, Conn: c, peer: peerOf(ctx)}
	defer d.conns.closed(c, http.StateClosed)
	defer c.Close()
	defer func() {
		if p := recover(); p != nil {
			d.log.Error("a request made the broker fail; its connection is closed", "panic", p, "stack", string(debug.Stack()))
		}
	}()
	l.head = io.LimitedReader{R: c}
	l.in = bufio.NewReader(&l.head)
	for patience := d.headTime; l.next(ctx, patience); patience = d.idleTime {
		l.peer.state.Store(connIdle)
	}
}

// next reads a request, which may take so long to begin, answers it, and says whether another may follow.
func (l *line) next(ctx context.Context, patience time.Duration) bool {
	l.head.N = int64(maxHead - l.in.Buffered())
	if l.in.Buffered() == 0 {
		l.SetReadDeadline(time.Now().Add(patience))
	}
	if _, err := l.in.Peek(1); err != nil {
		return false
	}
	l.peer.state.Store(connBusy)
	if !l.whole() {
		l.SetReadDeadline(time.Now().Add(l.headTime))
	}
	r, err := http.ReadRequest(l.in)
	if status := l.unreadable(r, err); status != 0 {
		if status > 0 {
			l.refuse(status)
		}
		return false
	}
	a := answer{header: http.Header{}}
	l.route(&a, r.WithContext(ctx))
	a.WriteHeader(http.StatusOK) // where it said nothing
	last := r.Close || r.ProtoMinor == 0 || a.header.Get("Connection") == "close" || l.conns.ending.Load()
	unread := r.ContentLength != 0 // and not read: here are no bodies
	if err := l.write(&a, r.Method == http.MethodHead, last || unread); err != nil {
		return false
	}
	if unread {
		l.discard()
	}
	return !last && !unread
}

// whole says whether all of the request is here already.
func (l *line) whole() bool {
	got, _ := l.in.Peek(l.in.Buffered())
	return bytes.Contains(got, []byte("\r\n\r\n"))
}

// unreadable returns the status for a request that cannot be answered, 0 for one that can, and -1 where nobody waits for an answer.
func (l *line) unreadable(r *http.Request, err error) int {
	var late net.Error
	switch {
	case err == nil && r.ProtoMajor != 1:
		return http.StatusHTTPVersionNotSupported
	case err == nil && r.ProtoMinor > 0 && r.Host == "":
		return http.StatusBadRequest
	case err == nil && spaced(r.Header):
		return http.StatusBadRequest
	case err == nil:
		return 0
	case l.head.N <= 0:
		return http.StatusRequestHeaderFieldsTooLarge
	case errors.As(err, &late), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return -1
	}
	return http.StatusBadRequest
}

// spaced says whether a header's name has a space, which the parser lets pass and no other header's name equals.
func spaced(h http.Header) bool {
	for name := range h {
		if strings.Contains(name, " ") {
			return true
		}
	}
	return false
}

// refuse answers what is no request. The rest of it is read before the connection is closed, else the answer would be lost with it.
func (l *line) refuse(status int) {
	a := answer{header: http.Header{}}
	http.Error(&a, strconv.Itoa(status)+" "+http.StatusText(status), status)
	if l.write(&a, false, true) == nil {
		l.discard()
	}
}

func (l *line) discard() {
	if c, ok := l.Conn.(interface{ CloseWrite() error }); ok {
		c.CloseWrite()
	}
	l.SetReadDeadline(time.Now().Add(discardTime))
	io.CopyN(io.Discard, l.Conn, maxDiscard)
}

// write sends an answer in one piece.
func (l *line) write(a *answer, headOnly, last bool) error {
	l.out.Reset()
	l.out.WriteString("HTTP/1.1 ")
	l.out.Write(strconv.AppendInt(l.out.AvailableBuffer(), int64(a.status), 10))
	l.out.WriteString(" " + http.StatusText(a.status) + "\r\nDate: " + l.now() + "\r\nContent-Length: ")
	l.out.Write(strconv.AppendInt(l.out.AvailableBuffer(), int64(len(a.body)), 10))
	l.out.WriteString("\r\n")
	if last {
		a.header.Set("Connection", "close")
	}
	a.header.Write(&l.out)
	l.out.WriteString("\r\n")
	if !headOnly {
		l.out.Write(a.body)
	}
	l.SetWriteDeadline(time.Now().Add(l.writeTime))
	_, err := l.Conn.Write(l.out.Bytes())
	clear(l.out.Bytes()) // it may have been a key
	clear(a.body)
	return err
}

// answer collects what a handler answers.
type answer struct {
	header http.Header
	status int
	body   []byte
}

func (a *answer) Header() http.Header { return a.header }

func (a *answer) WriteHeader(status int) {
	if a.status == 0 {
		a.status = status
	}
}

func (a *answer) Write(p []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	a.body = append(a.body, p...)
	return len(p), nil
}

// dateLine is the value of the Date header for one second.
type dateLine struct {
	second int64
	text   string
}

func (d *door) now() string {
	now := time.Now()
	line := d.date.Load()
	if line == nil || line.second != now.Unix() {
		line = &dateLine{now.Unix(), now.UTC().Format(http.TimeFormat)}
		d.date.Store(line)
	}
	return line.text
}
