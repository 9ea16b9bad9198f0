package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"keybroker/seal/passphrase"
)

// The protocol of unlock.sock: the opener accepts, looks at the peer's uid, and greets. Only then the client sends the passphrase,
// and closes its writing side. The opener answers {"ok":true}, or {"ok":false,"why":...}. Without the greeting a passphrase would
// lie in the socket of a broker that waits for none, until one day it opened a realm that somebody had locked.
type unlockMessage struct {
	Waiting bool   `json:"waiting,omitzero"` // the greeting
	OK      bool   `json:"ok,omitzero"`
	Why     string `json:"why,omitzero"`
}

const (
	unlockAnswerWait = time.Minute      // of the client, for the answer: Argon2id, behind other clients
	unlockGreetWait  = 2 * time.Second  // of the client, for the greeting
	unlockReadWait   = 10 * time.Second // of the opener, for the passphrase
	unlockPause      = time.Second      // of the opener, between two attempts
	unlockClients    = 8                // at once
	maxUnlockMessage = 4096             // octets
)

// serveUnlock hands every passphrase that an allowed peer brings to try, one at a time and at most one a second, until try returns
// nil. The peer gets try's error as the reason.
func serveUnlock(ctx context.Context, l *net.UnixListener, try func([]byte) error) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	context.AfterFunc(ctx, func() { l.Close() })
	attempts := make(chan unlockAttempt)
	accepting := make(chan error, 1)
	go func() { accepting <- acceptUnlock(ctx, l, attempts) }()
	for {
		var a unlockAttempt
		select {
		case err := <-accepting:
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return fmt.Errorf("waiting for a passphrase: %w", err)
		case a = <-attempts:
		}
		next := time.After(unlockPause)
		err := try(a.passphrase)
		clear(a.passphrase)
		a.answer(err)
		if err == nil {
			return nil
		}
		select {
		case <-next:
		case <-ctx.Done():
		}
	}
}

// An unlockAttempt is a passphrase that a client sent, and how to answer it.
type unlockAttempt struct {
	passphrase []byte
	answer     func(error)
}

// acceptUnlock serves clients, each on its own, until the listener is closed.
func acceptUnlock(ctx context.Context, l *net.UnixListener, attempts chan<- unlockAttempt) error {
	free := make(chan struct{}, unlockClients)
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return err
		}
		select {
		case free <- struct{}{}:
			go func() {
				defer func() { <-free }()
				defer c.Close()
				receiveUnlock(ctx, c, attempts)
			}()
		default:
			sendUnlock(c, unlockMessage{Why: "too many others bring passphrases; try again"})
			c.Close()
		}
	}
}

// receiveUnlock takes one passphrase of one client.
func receiveUnlock(ctx context.Context, c *net.UnixConn, attempts chan<- unlockAttempt) {
	if err := checkUnlockPeer(c); err != nil {
		sendUnlock(c, unlockMessage{Why: err.Error()})
		return
	}
	if !sendUnlock(c, unlockMessage{Waiting: true}) {
		return
	}
	c.SetReadDeadline(time.Now().Add(unlockReadWait))
	octets, err := io.ReadAll(io.LimitReader(c, passphrase.MaxLength+1))
	defer clear(octets)
	switch {
	case err != nil:
		sendUnlock(c, unlockMessage{Why: "no passphrase came in time"})
		return
	case len(octets) > passphrase.MaxLength:
		sendUnlock(c, unlockMessage{Why: passphrase.ErrTooLong.Error()})
		return
	case len(octets) == 0:
		sendUnlock(c, unlockMessage{Why: passphrase.ErrNone.Error()})
		return
	}
	done := make(chan struct{})
	a := unlockAttempt{passphrase: octets, answer: func(err error) {
		defer close(done)
		if err != nil {
			sendUnlock(c, unlockMessage{Why: errorLine(err)})
			return
		}
		sendUnlock(c, unlockMessage{OK: true})
	}}
	select {
	case attempts <- a:
		<-done
	case <-ctx.Done():
	}
}

// checkUnlockPeer lets root and this process's own user bring a passphrase.
func checkUnlockPeer(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if credErr != nil {
		return fmt.Errorf("asking for the peer's uid: %w", credErr)
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("only root may unlock the realm, and this is uid %d", cred.Uid)
	}
	return nil
}

// sendUnlock sends one line, and reports whether the peer took it.
func sendUnlock(c *net.UnixConn, m unlockMessage) bool {
	line, err := json.Marshal(&m)
	if err != nil {
		return false
	}
	c.SetWriteDeadline(time.Now().Add(unlockReadWait))
	_, err = c.Write(append(line, '\n'))
	return err == nil
}

// errNothingWaits: no opener accepts on unlock.sock.
var errNothingWaits = errors.New("nothing waits for a passphrase")

func newUnlockCommand(g *globals) *cobra.Command {
	var file string
	c := &cobra.Command{
		Use:   "unlock",
		Short: "Open a realm that waits for its passphrase, or that was locked",
		Long: `Open the realm of a running broker. If it was locked, the broker tries its slots again; if none opens without a person, the
passphrase goes straight to the process that opens the realm, and not through the broker.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return g.unlock(cmd.Context(), file) },
	}
	c.Flags().StringVar(&file, "passphrase-file", "", "`FILE` with the passphrase, less one newline at its end; - is standard input")
	return c
}

func (g *globals) unlock(ctx context.Context, file string) error {
	if err := hardenProcess(); err != nil {
		return err
	}
	paths, err := g.paths()
	if err != nil {
		return err
	}
	open, err := g.waitUntilWaiting(ctx)
	if err != nil {
		return err
	}
	if open {
		_, err := fmt.Fprintln(g.stdout, "the realm is open")
		return err
	}
	octets, err := g.passphraseFrom(file, "Passphrase of the realm", false).get(ctx)
	if err != nil {
		return err
	}
	defer clear(octets)
	if err := bringPassphrase(ctx, paths.UnlockSocket, octets); err != nil {
		return unlockHint(err)
	}
	if err := g.waitUntilOpen(ctx); err != nil {
		return err
	}
	_, err = fmt.Fprintln(g.stdout, "the realm is open")
	return err
}

func unlockHint(err error) error {
	switch {
	case errors.Is(err, errNothingWaits):
		return hintedError{err, "`keybroker status` says whether the realm is open already, and what else it waits for"}
	case errors.Is(err, fs.ErrPermission):
		return hintedError{err, "run it as root"}
	}
	return err
}

// realmState is what the broker's status says of the realm.
type realmState struct {
	Realm struct {
		State string `json:"state"`
		Why   string `json:"why"`
	} `json:"realm"`
}

const (
	unlockStatePoll = 50 * time.Millisecond
	unlockStateWait = 30 * time.Second // for the slots that need nobody, a slow TPM among them
	unlockLockWait  = 2 * time.Second  // for a broker that was asked to try again to begin
	unlockOpenWait  = 15 * time.Second // for the broker to have a keyholder, once the opener has opened the realm
)

// waitUntilWaiting has the broker try again if the realm is locked, and returns when it is open (true) or waits for a passphrase.
func (g *globals) waitUntilWaiting(ctx context.Context) (open bool, err error) {
	start := time.Now()
	asked := false
	for {
		var s realmState
		if err := g.ask(ctx, http.MethodGet, "/v1/status", &s); err != nil {
			return false, err
		}
		switch since := time.Since(start); {
		case s.Realm.State == "open":
			return true, nil
		case s.Realm.State == "waiting":
			return false, nil
		case s.Realm.State == "locked" && !asked:
			if err := g.ask(ctx, http.MethodPost, "/v1/unlock", nil); err != nil {
				return false, err
			}
			asked = true
		case s.Realm.State == "locked" && since > unlockLockWait, since > unlockStateWait:
			return false, hintedError{
				fmt.Errorf("the realm does not open: %s", s.Realm.Why),
				"`keybroker slot test` says of each slot why",
			}
		}
		select {
		case <-ctx.Done():
			return false, context.Cause(ctx)
		case <-time.After(unlockStatePoll):
		}
	}
}

// waitUntilOpen returns when the broker itself has the realm open: it starts the keyholder after the opener has ended, and what
// is asked for in between is refused.
func (g *globals) waitUntilOpen(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, unlockOpenWait, hintedError{
		fmt.Errorf("the passphrase is right, and the broker has no keyholder after %v", unlockOpenWait), "`keybroker status` says why"})
	defer cancel()
	for {
		var s realmState
		err := g.ask(ctx, http.MethodGet, "/v1/status", &s)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			return err
		case s.Realm.State == "open":
			return nil
		case s.Realm.State == "locked":
			return fmt.Errorf("the passphrase is right, and the realm is not open: %s", s.Realm.Why)
		}
		select {
		case <-ctx.Done():
		case <-time.After(unlockStatePoll):
		}
	}
}

// bringPassphrase gives the passphrase to the opener that waits at the socket.
func bringPassphrase(ctx context.Context, socket string, octets []byte) error {
	c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("%w: no broker serves %s", errNothingWaits, socket)
	case err != nil:
		return fmt.Errorf("bringing the passphrase: %w", err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	lines := bufio.NewReader(io.LimitReader(c, maxUnlockMessage))
	greeting, err := readUnlock(c, lines, unlockGreetWait)
	if err != nil {
		return fmt.Errorf("%w at %s", errNothingWaits, socket)
	}
	if !greeting.Waiting {
		return errors.New(greeting.Why)
	}
	if _, err := c.Write(octets); err != nil {
		return fmt.Errorf("bringing the passphrase: %w", err)
	}
	if err := c.(*net.UnixConn).CloseWrite(); err != nil {
		return fmt.Errorf("bringing the passphrase: %w", err)
	}
	answer, err := readUnlock(c, lines, unlockAnswerWait)
	switch {
	case err != nil:
		return fmt.Errorf("%w any more: somebody else opened the realm, or the broker ended", errNothingWaits)
	case !answer.OK:
		return errors.New(answer.Why)
	}
	return nil
}

// readUnlock reads one line of the opener's.
func readUnlock(c net.Conn, lines *bufio.Reader, wait time.Duration) (unlockMessage, error) {
	c.SetReadDeadline(time.Now().Add(wait))
	line, err := lines.ReadBytes('\n')
	if err != nil {
		return unlockMessage{}, err
	}
	var m unlockMessage
	err = json.Unmarshal(line, &m, json.RejectUnknownMembers(true))
	return m, err
}
