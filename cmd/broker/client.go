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
	"time"

	"github.com/go-json-experiment/json"
	"golang.org/x/sys/unix"

	"keybroker/inject"
)

// maxAnswer bounds what the broker's own sockets are believed to answer.
const maxAnswer = 16 << 20

// unixClient speaks HTTP to one Unix socket of the broker.
func unixClient(socket string) *http.Client {
	return &http.Client{
		Timeout: 30 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", socket)
			},
		},
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
	response, err := unixClient(socket).Do(r)
	if err != nil {
		return nil, unreachable(socket, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("reading the broker's answer: %w", err)
	}
	if response.StatusCode/100 == 2 {
		return body, nil
	}
	var refusal inject.Refusal
	if json.Unmarshal(body, &refusal) == nil && refusal.Code != "" {
		return nil, refusal
	}
	return nil, fmt.Errorf("the broker answered with status %d: %s", response.StatusCode, bytes.TrimSpace(body[:min(len(body), 200)]))
}

// unreachable says what it means that a socket does not answer.
func unreachable(socket string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return hintedError{fmt.Errorf("no broker serves %s", socket), "`systemctl start keybroker`, or name the broker's --state-dir"}
	case errors.Is(err, fs.ErrPermission):
		return hintedError{fmt.Errorf("this user may not open %s", socket), "run it as root, or as a member of group keybroker to read status"}
	}
	return fmt.Errorf("asking the broker at %s: %w", socket, err)
}
