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

// unixClient speaks HTTP to one Unix socket of the broker.
func unixClient(socket string) *http.Client {
	c := tcpClient()
	c.Transport.(*http.Transport).DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
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
	return c
}

// tcpClient speaks HTTP to the broker and to nobody on its behalf: it takes no proxy and follows nowhere.
func tcpClient() *http.Client {
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
	r, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, nil)
	if err != nil {
		return nil, err
	}
	return answer(unixClient(socket), r, socket)
}

// answer sends a request to the broker, which is at a socket or an address, and returns what it gives or its refusal.
func answer(client *http.Client, r *http.Request, at string) ([]byte, error) {
	response, err := client.Do(r)
	if err != nil {
		return nil, unreachable(at, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("reading the answer of the broker at %s: %w", at, err)
	}
	if response.StatusCode/100 == 2 {
		return body, nil
	}
	var refusal inject.Refusal
	if json.Unmarshal(body, &refusal) == nil && refusal.Code != "" {
		return nil, refusal
	}
	return nil, fmt.Errorf("the broker at %s answered with status %d: %s", at, response.StatusCode, bytes.TrimSpace(body[:min(len(body), 200)]))
}

// hungUp is a connection that ended unanswered: systemd listens for a broker that it may not start, or one that just ends.
func hungUp(err error) bool {
	return errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		strings.Contains(err.Error(), "server closed idle connection") // before the request was written; net/http exports no such error
}

// unreachable says what it means that a socket, or an address, does not answer.
func unreachable(at string, err error) error {
	var timeout net.Error
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED), hungUp(err):
		hint := "`systemctl start keybroker` starts it; --state-dir names another broker"
		if !strings.Contains(at, "/") {
			hint = "`systemctl start keybroker` starts it; listen in broker.toml says at which addresses it is"
		}
		return hintedError{fmt.Errorf("no broker serves %s", at), hint}
	case errors.Is(err, fs.ErrPermission):
		return hintedError{fmt.Errorf("this user may not open %s", at), "run it as root, or as a member of group keybroker to read status"}
	case errors.As(err, &timeout) && timeout.Timeout():
		return hintedError{fmt.Errorf("the broker at %s did not answer in time", at), "`journalctl -u keybroker` may say why"}
	}
	return fmt.Errorf("asking the broker at %s: %w", at, err)
}
