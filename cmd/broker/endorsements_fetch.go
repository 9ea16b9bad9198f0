package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/endorsements"
	"keybroker/attest/snp/keyservice"
)

// fetchFlags say what to get, and from where.
type fetchFlags struct {
	evidence             string
	product, chipID, tcb string
	ca, crl, vlek        bool
	url                  string
	wait                 time.Duration
}

func newEndorsementsFetchCommand(g *globals, dir *string) *cobra.Command {
	f := &fetchFlags{}
	c := &cobra.Command{
		Use:   "fetch",
		Short: "Get certificates and revocation lists from AMD's key service, and store them",
		Long: `Get from AMD's key service, or from a mirror of it, the certificate of the VCEK that signed a report (--evidence), or of the VCEK
that --product, --chip-id and --tcb name; with --ca its issuers, with --crl the revocation list. A certificate that is stored and
has not expired is not asked for again. --ca and --crl alone need --product, or else are for each line that something is stored of.

The service is asked at most once in 10 seconds, and not before the time that it says when it asks to wait, by however many
processes; this waits for its turn, and says so.

A VLEK's certificate cannot be fetched: AMD gives it to the provider alone. Take it from a guest (configfs-tsm's auxblob) and
import it; its issuer (--vlek --ca) can be fetched.

` + endorsementsHelp,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return g.fetch(cmd.Context(), *dir, f) },
	}
	c.Flags().StringVar(&f.evidence, "evidence", "", "`FILE` with the report")
	c.Flags().StringVar(&f.product, "product", "", "the `LINE`: Milan, Genoa or Turin; for reports of version 2, which do not say it, too")
	c.Flags().StringVar(&f.chipID, "chip-id", "", "the chip's CHIP_ID in hexadecimal `DIGITS`")
	c.Flags().StringVar(&f.tcb, "tcb", "", "the reported TCB as `PARTS`: bootloader=10,tee=0,snp=27,microcode=27; Turin has fmc=0 too")
	c.Flags().BoolVar(&f.ca, "ca", false, "get the issuers (ASK, ARK)")
	c.Flags().BoolVar(&f.crl, "crl", false, "get the revocation list")
	c.Flags().BoolVar(&f.vlek, "vlek", false, "--ca and --crl are about VLEKs (ASVK) in place of VCEKs")
	c.Flags().StringVar(&f.url, "url", keyservice.AMD, "where the key service is, as far as /vcek: an `ADDRESS` with https, or with http")
	c.Flags().DurationVar(&f.wait, "wait", 2*time.Minute, "for how long (`DURATION`) it may wait for its turn, for each thing that it gets")
	c.MarkFlagsMutuallyExclusive("evidence", "chip-id")
	c.MarkFlagsMutuallyExclusive("evidence", "tcb")
	c.MarkFlagsMutuallyExclusive("evidence", "vlek")
	c.MarkFlagsRequiredTogether("chip-id", "tcb")
	c.RegisterFlagCompletionFunc("product", cobra.FixedCompletions(snp.Lines(), cobra.ShellCompDirectiveNoFileComp))
	return c
}

// A fetchPlan is what fetch gets, in this order: issuers, a key's certificate, revocation lists.
type fetchPlan struct {
	kind  string   // of keys whose issuers and lists are wanted
	lines []string // of these issuers and lists
	key   *snp.Key // nil: none
}

func (g *globals) fetch(ctx context.Context, dir string, f *fetchFlags) error {
	plan, err := f.plan()
	if err != nil {
		return err
	}
	s, err := g.openEndorsements(dir, true)
	if err != nil {
		return err
	}
	if len(plan.lines) == 0 {
		if plan.lines, err = storedLines(s); err != nil {
			return err
		}
	}
	client, err := keyservice.New(keyservice.Config{
		URL: f.url, Store: s, Patience: f.wait,
		Progress: func(text string) { fmt.Fprintf(g.stderr, "keybroker: %s\n", text) },
	})
	if err != nil {
		return usageError{fmt.Errorf("--url: %w", err)}
	}
	g.warnPlain(f.url)
	for _, get := range plan.steps(ctx, f, client) {
		stored, err := get()
		if err != nil {
			return endorsementsHint(s, fetchStatus(err))
		}
		if stored == nil {
			fmt.Fprintln(g.stdout, "kept    it is stored already")
		}
		if err := g.printStored(stored); err != nil {
			return err
		}
	}
	return nil
}

// plan makes out of the flags what to get.
func (f *fetchFlags) plan() (*fetchPlan, error) {
	p := &fetchPlan{kind: attest.VCEK}
	if f.product != "" {
		if !slices.Contains(snp.Lines(), f.product) {
			return nil, usageError{fmt.Errorf("--product: expected %s, got %.40q", strings.Join(snp.Lines(), ", "), f.product)}
		}
		p.lines = []string{f.product}
	}
	if f.vlek {
		p.kind = attest.VLEK
	}
	switch {
	case f.evidence != "":
		return p, f.ofEvidence(p)
	case f.chipID != "":
		return p, f.ofChip(p)
	case !f.ca && !f.crl:
		return nil, usageError{errors.New("expected what to get: --evidence, or --product with --chip-id and --tcb; or --ca or --crl")}
	}
	return p, nil
}

// ofEvidence plans for the key that signed a report.
func (f *fetchFlags) ofEvidence(p *fetchPlan) error {
	octets, err := readBounded(f.evidence)
	if err != nil {
		return err
	}
	keys, err := snp.KeysOf(octets[:min(len(octets), snp.ReportSize)])
	if err != nil {
		return statusError{fmt.Errorf("reading %s: %w", f.evidence, err), exitRefused}
	}
	if f.product != "" {
		keys = slices.DeleteFunc(keys, func(k snp.Key) bool { return k.Line != f.product })
	}
	switch {
	case len(keys) == 0:
		return usageError{fmt.Errorf("--product: expected the line that the report is of, got %s", f.product)}
	case len(keys) > 1:
		return hintedError{usageError{fmt.Errorf("reading %s: a report of version 2 does not say of which line its processor is", f.evidence)}, "say it with --product"}
	}
	k := keys[0]
	p.kind, p.lines = k.Kind, []string{k.Line}
	switch {
	case k.Kind == attest.VLEK && (f.ca || f.crl):
		return nil
	case k.Kind == attest.VLEK:
		return hintedError{statusError{errors.New("the report is signed by a VLEK, whose certificate AMD gives to the provider alone"), exitNone},
			"take it from the guest (configfs-tsm's auxblob) and import it; --ca and --crl get what AMD publishes"}
	case k.Path() == "":
		return hintedError{statusError{errors.New("the report hides which chip made it"), exitNone}, "name it with --product, --chip-id and --tcb"}
	}
	p.key = &k
	return nil
}

// ofChip plans for the key of a chip at a TCB.
func (f *fetchFlags) ofChip(p *fetchPlan) error {
	if f.product == "" {
		return usageError{errors.New("--chip-id: expected --product beside it")}
	}
	size := snp.HardwareIDSize(f.product)
	chip, err := hex.DecodeString(f.chipID)
	if err != nil || len(chip) != size && len(chip) != 64 || slices.ContainsFunc(chip[size:], func(b byte) bool { return b != 0 }) {
		return usageError{fmt.Errorf("--chip-id: expected %d hexadecimal digits for %s, got %d characters", 2*size, f.product, len(f.chipID))}
	}
	tcb, err := parseTCB(f.product, f.tcb)
	if err != nil {
		return usageError{fmt.Errorf("--tcb: %w", err)}
	}
	p.key = &snp.Key{Kind: attest.VCEK, Line: f.product, Chip: chip[:size], TCB: tcb}
	return nil
}

// parseTCB reads "bootloader=10,tee=0,snp=27,microcode=27": each part of the line once, in any order.
func parseTCB(line, text string) (attest.TCB, error) {
	parts := snp.TCBParts(line)
	values, seen := make([]uint8, len(parts)), make([]bool, len(parts))
	for field := range strings.SplitSeq(text, ",") {
		name, number, _ := strings.Cut(field, "=")
		i := slices.Index(parts, name)
		n, err := strconv.ParseUint(number, 10, 8)
		if i < 0 || seen[i] || err != nil {
			return attest.TCB{}, fmt.Errorf("expected each of %s of %s once, with a number from 0 to 255, got %.40q", strings.Join(parts, ", "), line, field)
		}
		values[i], seen[i] = uint8(n), true
	}
	if i := slices.Index(seen, false); i >= 0 {
		return attest.TCB{}, fmt.Errorf("expected %s too", parts[i])
	}
	return snp.TCBOf(line, values)
}

// storedLines returns the lines that something is stored of.
func storedLines(s *endorsements.Store) ([]string, error) {
	entries, err := s.List()
	if err != nil {
		return nil, endorsementsHint(s, err)
	}
	var out []string
	for _, e := range entries {
		if e.Err == nil && !slices.Contains(out, e.Endorsement.Line) {
			out = append(out, e.Endorsement.Line)
		}
	}
	if len(out) == 0 {
		return nil, usageError{errors.New("--product is missing, and nothing is stored that says of which lines")}
	}
	return out, nil
}

// steps are the requests of a plan.
func (p *fetchPlan) steps(ctx context.Context, f *fetchFlags, client *keyservice.Client) []func() ([]endorsements.Stored, error) {
	var out []func() ([]endorsements.Stored, error)
	for _, line := range p.lines {
		if f.ca {
			out = append(out, func() ([]endorsements.Stored, error) { return client.Chain(ctx, line, p.kind) })
		}
	}
	if p.key != nil {
		out = append(out, func() ([]endorsements.Stored, error) { return client.VCEK(ctx, *p.key) })
	}
	for _, line := range p.lines {
		if f.crl {
			out = append(out, func() ([]endorsements.Stored, error) { return client.CRL(ctx, line, p.kind) })
		}
	}
	return out
}

// fetchStatus gives an error of the key service its exit status.
func fetchStatus(err error) error {
	if errors.Is(err, keyservice.ErrUnavailable) {
		err = hintedError{err, "try again later, with a longer --wait if it asks for that; or fetch on another machine and import its files here"}
	}
	for cause, status := range map[error]exitStatus{
		keyservice.ErrUnavailable: exitUnavailable, keyservice.ErrNone: exitNone, keyservice.ErrAnswer: exitRefused,
	} {
		if errors.Is(err, cause) {
			return statusError{err, status}
		}
	}
	return err
}

// warnPlain warns of a service that is asked without TLS, unless it is on this host. What comes is verified either way.
func (g *globals) warnPlain(address string) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "http" {
		return
	}
	if ip := net.ParseIP(u.Hostname()); u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
		g.warn("%s is asked without TLS: who listens on the way learns which chips you have", address)
	}
}
