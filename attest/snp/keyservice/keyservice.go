// Package keyservice is a client of a key service of AMD's shape, which publishes the certificates of VCEKs, of their issuers, and
// revocation lists (AMD's publication 57230, section 4). What it gets goes into a store of endorsements.
//
// The service serves few requests: the client asks at most once in 10 s, waits as long as the service says, and never asks
// twice for the same, also when it runs in several processes at once: they share a lock and a note in the store's folder.
package keyservice

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/endorsements"
	"keybroker/attest/snp/internal/folder"
)

// AMD is AMD's own service.
const AMD = "https://kdsintf.amd.com"

// interval is the least time between two requests.
const interval = 10 * time.Second

// Bounds of what a service may do.
const (
	maxTries      = 5
	maxRetryAfter = 24 * time.Hour // a longer one counts as this
	answerTimeout = 30 * time.Second
	maxVCEK       = 16 << 10 // octets
	maxChain      = 64 << 10
	maxCRL        = 256 << 10
)

var (
	// ErrUnavailable says that the service cannot be reached, fails, or wants to be left alone for longer than Patience.
	ErrUnavailable = errors.New("the key service is not available")
	// ErrNone says that the service does not have it.
	ErrNone = errors.New("the key service does not have it")
	// ErrAnswer says that the service answered with something else. Nothing of it was stored.
	ErrAnswer = errors.New("the key service's answer was refused")
)

// Config is what a Client needs.
type Config struct {
	URL      string              // of the service; empty: AMD
	Store    *endorsements.Store // where to put what comes; must be there, and its folder exist
	Patience time.Duration       // for how long in all one call may wait for its turn and for what the service asks; zero: not at all

	Progress  func(text string)                          // told when it waits; nil: nobody
	Transport http.RoundTripper                          // nil: one of its own, by the environment's proxy
	Now       func() time.Time                           // nil: time.Now
	Wait      func(context.Context, time.Duration) error // nil: by the clock
}

// A Client asks one service. It may be used by many goroutines.
type Client struct {
	Config
	http http.Client
}

// New makes a client. Nothing is asked yet.
func New(c Config) (*Client, error) {
	c.URL = strings.TrimSuffix(cmp.Or(c.URL, AMD), "/")
	if err := checkURL(c.URL); err != nil {
		return nil, fmt.Errorf("choosing a key service: %w", err)
	}
	if c.Store == nil {
		return nil, errors.New("choosing a key service: expected a store for what it has")
	}
	if c.Progress == nil {
		c.Progress = func(string) {}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Wait == nil {
		c.Wait = wait
	}
	if c.Transport == nil {
		c.Transport = &http.Transport{
			Proxy: http.ProxyFromEnvironment, TLSHandshakeTimeout: answerTimeout, DisableCompression: true, DisableKeepAlives: true,
			MaxResponseHeaderBytes: 64 << 10, ForceAttemptHTTP2: true,
		}
	}
	return &Client{c, http.Client{
		Transport:     c.Transport,
		Timeout:       answerTimeout, // the body included
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// checkURL takes the beginning of addresses, over TLS or not: what comes is verified anyway.
func checkURL(s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "" {
		return fmt.Errorf("expected an address such as %s, got %.100q", AMD, s)
	}
	return nil
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// A request is one thing that is wanted.
type request struct {
	what   string // for people
	path   string
	most   int                            // octets of the answer
	stored func() bool                    // says that the store has it; nil: it changes, and is asked for again each time
	wanted func([]*snp.Endorsement) error // refuses what is something else
}

// VCEK gets the certificate of a chip's key at one TCB. One that is stored and has not expired is not asked for again: none is
// returned then.
func (c *Client) VCEK(ctx context.Context, k snp.Key) ([]endorsements.Stored, error) {
	if k.Path() == "" {
		return nil, fmt.Errorf("expected a VCEK's line, hardware id and TCB, got %s %s", k.Kind, k.Line)
	}
	return c.get(ctx, request{
		what: "the VCEK's certificate", path: k.Path(), most: maxVCEK,
		stored: func() bool {
			e, err := c.Store.Get(k)
			return err == nil && c.Now().Before(e.Until)
		},
		wanted: func(list []*snp.Endorsement) error {
			if len(list) != 1 || !list[0].Key.Equal(k) {
				return fmt.Errorf("expected %s, got %s", describeKey(k), describe(list))
			}
			return nil
		},
	})
}

func describeKey(k snp.Key) string {
	return fmt.Sprintf("the %s of chip %x of %s at %s", k.Kind, k.Chip, k.Line, snp.FormatTCB(k.Line, k.TCB))
}

// describe says what an answer was.
func describe(list []*snp.Endorsement) string {
	var out []string
	for _, e := range list {
		if e.Key.Kind == attest.VCEK {
			out = append(out, describeKey(e.Key))
		} else {
			out = append(out, fmt.Sprintf("the %s of %s", e.Kind, e.Line))
		}
	}
	return cmp.Or(strings.Join(out, ", "), "nothing")
}

// Chain gets the issuers of a line's VCEKs or VLEKs: kind is attest.VCEK or attest.VLEK.
func (c *Client) Chain(ctx context.Context, line, kind string) ([]endorsements.Stored, error) {
	issuer := snp.IssuerOf(kind)
	return c.get(ctx, request{
		what: fmt.Sprintf("the %s of %s", issuer, line), path: snp.ChainPath(line, kind), most: maxChain, wanted: only(line, issuer, snp.ARK),
	})
}

// CRL gets the revocation list for the issuers of a line's VCEKs or VLEKs.
func (c *Client) CRL(ctx context.Context, line, kind string) ([]endorsements.Stored, error) {
	return c.get(ctx, request{
		what: fmt.Sprintf("the revocation list of %s for %ss", line, kind), path: snp.CRLPath(line, kind), most: maxCRL, wanted: only(line, snp.CRL),
	})
}

// only takes what has an endorsement of this kind, and perhaps some of the others.
func only(line, kind string, others ...string) func([]*snp.Endorsement) error {
	return func(list []*snp.Endorsement) error {
		found := false
		for _, e := range list {
			found = found || e.Kind == kind
			if e.Line != line || e.Kind != kind && !slices.Contains(others, e.Kind) {
				return fmt.Errorf("expected the %s of %s, got %s", kind, line, describe(list))
			}
		}
		if !found {
			return fmt.Errorf("expected the %s of %s, got %s", kind, line, describe(list))
		}
		return nil
	}
}

// get asks for one thing, when it is this client's turn, unless somebody has just got it.
func (c *Client) get(ctx context.Context, r request) ([]endorsements.Stored, error) {
	began := c.Now()
	f, err := folder.Open(c.Store.Dir())
	if err != nil {
		return nil, err
	}
	defer f.Close()
	l, err := c.lock(ctx, f)
	if err != nil {
		return nil, err
	}
	defer l.Unlock()
	n := readNote(f, c.URL, c.Now())
	if n.got(r.path, began) || r.stored != nil && r.stored() {
		return nil, nil
	}
	for try := 1; ; try++ {
		if err := c.turn(ctx, n, began.Add(c.Patience)); err != nil {
			return nil, fmt.Errorf("getting %s: %w", r.what, err)
		}
		octets, later, err := c.askOnce(ctx, l, n, r)
		if err == nil {
			return c.put(ctx, l, n, r, octets)
		}
		if later == 0 || try == maxTries {
			return nil, fmt.Errorf("getting %s: %w", r.what, err)
		}
		c.Progress(fmt.Sprintf("the key service asks to wait %s", later.Round(time.Second)))
	}
}

// lock waits until no other process talks to the service.
func (c *Client) lock(ctx context.Context, f *folder.Folder) (*folder.Lock, error) {
	limited, cancel := context.WithTimeout(ctx, c.Patience+answerTimeout)
	defer cancel()
	l, err := f.Lock(limited, "keyservice", func() { c.Progress("another process asks the key service; waiting for it") })
	if err != nil && limited.Err() != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return l, err
}

// turn waits until the service may be asked.
func (c *Client) turn(ctx context.Context, n *note, end time.Time) error {
	now := c.Now()
	next := n.next(now)
	if !next.After(now) {
		return nil
	}
	if next.After(end) {
		return fmt.Errorf("%w: it may be asked again at %s", ErrUnavailable, next.UTC().Format(time.RFC3339))
	}
	d := next.Sub(now)
	c.Progress(fmt.Sprintf("waiting %s: the key service may be asked again at %s", d.Round(time.Second), next.UTC().Format(time.TimeOnly)))
	return c.Wait(ctx, d)
}

// askOnce makes one request. What it notes, before and after, holds for other processes as well, also if this one is killed.
func (c *Client) askOnce(ctx context.Context, l *folder.Lock, n *note, r request) (octets []byte, later time.Duration, err error) {
	n.Next = c.Now().Add(interval)
	if err := n.write(l); err != nil {
		return nil, 0, err
	}
	octets, later, err = c.ask(ctx, r)
	n.Next = c.Now().Add(max(later, interval))
	return octets, later, errors.Join(err, n.write(l))
}

// ask makes the request itself. When the service asks to be left alone, later says for how long.
func (c *Client) ask(ctx context.Context, r request) (octets []byte, later time.Duration, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL+r.path, nil)
	if err != nil {
		return nil, 0, err
	}
	req.Header.Set("User-Agent", "keybroker")
	res, err := c.http.Do(req)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	defer res.Body.Close()
	if err := c.status(res); err != nil {
		if res.StatusCode == http.StatusTooManyRequests || res.StatusCode == http.StatusServiceUnavailable {
			later = retryAfter(res.Header.Get("Retry-After"), c.Now())
		}
		return nil, later, err
	}
	octets, err = io.ReadAll(io.LimitReader(res.Body, int64(r.most)+1))
	switch {
	case err != nil:
		return nil, 0, fmt.Errorf("%w: reading its answer: %w", ErrUnavailable, err)
	case len(octets) > r.most:
		return nil, 0, fmt.Errorf("%w: expected at most %d octets, got more", ErrAnswer, r.most)
	}
	return octets, 0, nil
}

// status takes 200 alone.
func (c *Client) status(res *http.Response) error {
	where := res.Request.URL.String()
	switch s := res.StatusCode; {
	case s == http.StatusOK:
		return nil
	case s >= 300 && s < 400:
		return fmt.Errorf("%w: %s leads to %.200q; if that is a key service, name it as the one to ask", ErrAnswer, where, res.Header.Get("Location"))
	case s == http.StatusTooManyRequests || s >= 500:
		return fmt.Errorf("%w: %s: status %d", ErrUnavailable, where, s)
	case s >= 400:
		return fmt.Errorf("%w: %s: status %d", ErrNone, where, s)
	default:
		return fmt.Errorf("%w: %s: expected status 200, got %d", ErrAnswer, where, s)
	}
}

// retryAfter reads for how long a service wants to be left alone (RFC 9110, section 10.2.3): seconds, or a date. It is at least
// interval.
func retryAfter(header string, now time.Time) time.Duration {
	var d time.Duration
	if seconds, err := strconv.ParseUint(header, 10, 32); err == nil {
		d = time.Duration(seconds) * time.Second
	} else if at, err := http.ParseTime(header); err == nil {
		d = at.Sub(now)
	}
	return min(max(d, interval), maxRetryAfter)
}

// put verifies an answer and stores it.
func (c *Client) put(ctx context.Context, l *folder.Lock, n *note, r request, octets []byte) ([]endorsements.Stored, error) {
	given, err := snp.ParseFile(octets)
	if err != nil {
		return nil, fmt.Errorf("getting %s: %w: %w", r.what, ErrAnswer, err)
	}
	stored, err := c.Store.Put(ctx, given, r.wanted)
	switch {
	case errors.Is(err, endorsements.ErrRefused):
		return nil, fmt.Errorf("getting %s: %w: %w", r.what, ErrAnswer, err)
	case err != nil || r.stored != nil:
		return stored, err
	}
	n.Got[r.path] = c.Now()
	return stored, n.write(l)
}
