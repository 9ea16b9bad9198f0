package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"golang.org/x/sys/unix"

	"keybroker/inject"
)

// maxAnswer bounds what the broker's own sockets are believed to answer.
const maxAnswer = 16 << 20

// answerWait is how long the broker may take for an answer: starting the realm's keyholder is the longest that it does.
const answerWait = 30 * time.Second

// dialAgain is the pause before a socket is tried again whose queue of connections is full.
const dialAgain = 5 * time.Millisecond

// A server is a broker as one reaches it: at a Unix socket or an address.
type server struct {
	client *http.Client
	at     string // the socket or the address, in messages
	host   string // in URLs
	absent string // what to do when nobody is there
}

// unixServer speaks HTTP to one Unix socket of the broker.
func unixServer(socket string) *server {
	s := &server{plainClient(), socket, "localhost", "`systemctl start keybroker` starts it; --state-dir names another broker"}
	s.client.Transport.(*http.Transport).DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		for { // a full queue is EAGAIN at once, where TCP would try again by itself
			conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
			if !errors.Is(err, unix.EAGAIN) {
				return conn, err
			}
			select {
			case <-time.After(dialAgain):
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	}
	return s
}

// tcpServer speaks HTTP to the broker at an address.
func tcpServer(address string) *server {
	return &server{plainClient(), address, address, "`systemctl start keybroker` starts it; listen in broker.toml says at which addresses it is"}
}

// plainClient speaks HTTP to the broker and to nobody on its behalf: it takes no proxy and follows nowhere.
func plainClient() *http.Client {
	return &http.Client{
		Timeout:       answerWait,
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// ask sends one request to the admin socket and decodes the answer into v, unless v is nil.
func (g *globals) ask(ctx context.Context, method, path string, v any) error {
	p, err := g.paths()
	if err != nil {
		return err
	}
	body, err := request(ctx, p.AdminSocket, method, path)
	if err != nil || v == nil {
		return err
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("reading the broker's answer (is it of another version?): %w", err)
	}
	return nil
}

func request(ctx context.Context, socket, method, path string) ([]byte, error) {
	s := unixServer(socket)
	r, err := http.NewRequestWithContext(ctx, method, "http://"+s.host+path, nil)
	if err != nil {
		return nil, err
	}
	return s.answer(r)
}

// do sends a request to the broker.
func (s *server) do(r *http.Request) (*http.Response, error) {
	response, err := s.client.Do(r)
	if err != nil {
		return nil, s.unreachable(err)
	}
	return response, nil
}

// answer sends a request to the broker and returns what it gives or its refusal.
func (s *server) answer(r *http.Request) ([]byte, error) {
	response, err := s.do(r)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("reading the answer of the broker at %s: %w", s.at, err)
	}
	if response.StatusCode/100 == 2 {
		return body, nil
	}
	var refusal inject.Refusal
	if json.Unmarshal(body, &refusal) == nil && refusal.Code != "" {
		return nil, refusal
	}
	return nil, fmt.Errorf("the broker at %s answered with status %d: %s", s.at, response.StatusCode, bytes.TrimSpace(body[:min(len(body), 200)]))
}

// hungUp is a connection that ended unanswered: systemd listens for a broker that it may not start, or one that just ends.
func hungUp(err error) bool {
	return errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		strings.Contains(err.Error(), "server closed idle connection") // before the request was written; net/http exports no such error
}

// unreachable says what it means that the broker does not answer.
func (s *server) unreachable(err error) error {
	var timeout net.Error
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED), hungUp(err):
		return hintedError{fmt.Errorf("no broker serves %s", s.at), s.absent}
	case errors.Is(err, fs.ErrPermission):
		return hintedError{fmt.Errorf("this user may not open %s", s.at), "run it as root, or as a member of group keybroker to read status"}
	case errors.As(err, &timeout) && timeout.Timeout():
		return hintedError{fmt.Errorf("the broker at %s did not answer in time", s.at), "`journalctl -u keybroker` may say why"}
	}
	return fmt.Errorf("asking the broker at %s: %w", s.at, err)
}
