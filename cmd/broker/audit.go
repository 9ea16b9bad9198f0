package main

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"keybroker/inject"
	"keybroker/internal/audit"
	"keybroker/internal/config"
	"keybroker/internal/daemon"
	"keybroker/internal/plain"
	"keybroker/internal/store"
)

// tableRows is how many records `audit query` shows when nobody says.
const tableRows = 100

func newAuditCommand(g *globals) *cobra.Command {
	c := &cobra.Command{
		Use:   "audit",
		Short: "Verify and search the record of what was released and refused",
	}
	c.AddCommand(newAuditVerifyCommand(g), newAuditQueryCommand(g), newAuditResetCommand(g))
	return c
}

// verifyFlags are the flags of `audit verify`.
type verifyFlags struct {
	heads      []string
	identities []string
	dir        string
}

func newAuditVerifyCommand(g *globals) *cobra.Command {
	var f verifyFlags
	c := &cobra.Command{
		Use:   "verify",
		Short: "Check the audit log for edits, removals, recomputed chains and a cut tail",
		Long: `Check every record of the audit log. Exit status 0: it is whole; 1: it is broken, with each place and what was expected and found.

The chain shows an edit, an insertion and a removal. With --identity, signed checkpoints show a chain that was computed anew. A tail
that was cut off shows against a head: the one in the broker's store, which is read when no broker holds the store, and each --head
that was noted elsewhere ("keybroker status" prints it). Whoever has the realm and may write to this host can make a whole
new log; only a head that was kept elsewhere shows that. Neither the realm nor a running broker is needed.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return g.verifyAudit(f) },
	}
	c.Flags().StringArrayVar(&f.heads, "head", nil, "a head that was noted earlier, `SEQ:HASH`; may be repeated")
	c.Flags().StringArrayVar(&f.identities, "identity", nil, "the realm's public key, `ed25519:...`, as \"keybroker identity\" prints it; may be repeated")
	c.Flags().StringVar(&f.dir, "dir", "", "the log's folder, or a copy of it; the store is then not read (default: this broker's `DIR`)")
	return c
}

func (g *globals) verifyAudit(f verifyFlags) error {
	opts, err := f.options()
	if err != nil {
		return err
	}
	p, err := g.paths()
	if err != nil {
		return err
	}
	dir, stored := f.dir, "not read: --dir names a log by itself"
	if dir == "" {
		dir = p.AuditDir
		stored = addStoredHead(p, &opts)
	}
	report, err := audit.Verify(dir, opts)
	if err != nil {
		return auditHint(err)
	}
	printReport(g.stdout, dir, stored, f.identities, report)
	if !report.OK() {
		return brokenHint(report)
	}
	return nil
}

// brokenHint says what to do about a broken log, or about a head that it does not have.
func brokenHint(r *audit.Report) error {
	if r.MoreBreaks == 0 && !slices.ContainsFunc(r.Breaks, func(b audit.Break) bool { return !b.Noted }) {
		return hintedError{errors.New("the audit log does not have each head that was given"),
			"the log agrees with itself: look whether the head is whole, and of this log; if it is, the log was cut or made anew, so keep a copy of the folder and look who was on this host"}
	}
	return hintedError{fmt.Errorf("%w in %s", audit.ErrBroken, several(len(r.Breaks)+r.MoreBreaks, "place")),
		"keep a copy of the folder; `keybroker audit reset --reason TEXT` sets the log aside and begins a new one"}
}

func (f *verifyFlags) options() (opts audit.VerifyOptions, err error) {
	for _, text := range f.heads {
		h, err := audit.ParseHead(text)
		if err != nil {
			return opts, usageError{fmt.Errorf("--head: %w", err)}
		}
		opts.Heads = append(opts.Heads, h)
	}
	for _, text := range f.identities {
		p, err := inject.ParsePin(text)
		if err != nil {
			return opts, usageError{fmt.Errorf("--identity: %w", err)}
		}
		opts.PublicKeys = append(opts.PublicKeys, ed25519.PublicKey(p[:]))
	}
	return opts, nil
}

// addStoredHead adds the store's head to what the log is compared with, and says what came of it.
func addStoredHead(p config.Paths, opts *audit.VerifyOptions) string {
	h, err := storedHead(p.Store)
	switch {
	case errors.Is(err, store.ErrHeld):
		return "not read: a broker holds the store; \"keybroker status\" shows its head"
	case errors.Is(err, fs.ErrNotExist):
		return "none: there is no store"
	case err != nil:
		return "not read: " + err.Error()
	case h.Seq == 0:
		return "none in the store"
	}
	opts.Heads, opts.Stored = append(opts.Heads, h), h
	return h.String()
}

func storedHead(path string) (audit.Head, error) {
	s, err := store.OpenReadOnly(path)
	if err != nil {
		return audit.Head{}, err
	}
	defer s.Close()
	return daemon.LoadHead(s)
}

func printReport(w io.Writer, dir, stored string, identities []string, r *audit.Report) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	defer t.Flush()
	line := func(name, format string, args ...any) {
		fmt.Fprintf(t, "%s\t%s\n", name, plain.Line(fmt.Sprintf(format, args...)))
	}
	line("log", "%s: %s in %s", dir, several(r.Records, "record"), several(r.Files, "file"))
	if r.Records > 0 {
		line("first", "record %d, %s, %s", r.First.Seq, r.First.Time.Format(time.RFC3339), r.First.File)
		line("last", "record %d, %s, %s", r.Last.Seq, r.Last.Time.Format(time.RFC3339), r.Last.File)
		line("head", "%s", r.Head)
	}
	line("stored head", "%s", stored)
	switch {
	case r.Signed.Seq == 0:
		line("checkpoints", "%d, none of which fits", r.Checkpoints)
	case len(identities) > 0:
		line("checkpoints", "%d, the newest signs all up to record %d, %s", r.Checkpoints, r.Signed.Seq, r.SignedAt.Format(time.RFC3339))
	default:
		line("checkpoints", "%d, the newest is over all up to record %d; signatures not checked", r.Checkpoints, r.Signed.Seq)
	}
	for _, n := range r.Notes {
		line("note", "%s", n)
	}
	for _, b := range r.Breaks {
		line("BROKEN", "%s", b.Error())
	}
	if r.MoreBreaks > 0 {
		line("BROKEN", "and %s more", several(r.MoreBreaks, "place"))
	}
	if r.OK() {
		line("result", "ok")
	} else {
		line("result", "broken")
	}
}

// several counts things: 1 file, 2 files.
func several[T int | uint64](n T, thing string) string {
	if n != 1 {
		thing += "s"
	}
	return fmt.Sprintf("%d %s", n, thing)
}

// auditHint adds what a user can do about an error of the log's files.
func auditHint(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return hintedError{err, "run it as root"}
	case errors.Is(err, fs.ErrNotExist):
		return hintedError{err, "no broker has run here; --dir and --state-dir name another place"}
	case errors.Is(err, audit.ErrHeld), errors.Is(err, store.ErrHeld):
		return hintedError{err, stopBroker + " first"}
	}
	return err
}

// queryFlags are the flags of `audit query`.
type queryFlags struct {
	since, until string
	event        string
	filter       audit.Filter
	dir          string
	json         bool
}

func newAuditQueryCommand(g *globals) *cobra.Command {
	var f queryFlags
	c := &cobra.Command{
		Use:   "query",
		Short: "Search the audit log",
		Long: `Show the records of the audit log that meet every condition given, oldest first: as a table, or with --json as the lines of the
log, octet by octet. A time is RFC 3339 (2026-11-21T12:00:00Z), a date in UTC (2026-11-21), or how long ago it is (90m, 36h).`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.queryAudit(f, cmd.Flags().Changed("limit"))
		},
	}
	c.Flags().StringVar(&f.since, "since", "", "from this `TIME` on")
	c.Flags().StringVar(&f.until, "until", "", "before this `TIME`")
	c.Flags().StringVar(&f.filter.Subject, "subject", "", "this service, or VM's `UUID`")
	c.Flags().StringVar(&f.filter.Tier, "tier", "", "this `TIER`: "+strings.Join(tiers, ", "))
	c.Flags().StringVar(&f.event, "event", "", "this `EVENT`: "+strings.Join(eventNames(), ", "))
	c.Flags().StringVar(&f.filter.Decision, "decision", "", "this `DECISION`: "+strings.Join(decisions, ", "))
	c.Flags().StringVar(&f.filter.Code, "code", "", "refusals with this `CODE`")
	c.Flags().IntVar(&f.filter.Limit, "limit", tableRows, "the newest `N` of them; 0 is all (default with --json)")
	c.Flags().StringVar(&f.dir, "dir", "", "the log's folder, or a copy of it (default: this broker's `DIR`)")
	c.Flags().BoolVar(&f.json, "json", false, "print the log's lines")
	for flag, words := range map[string][]string{"tier": tiers, "event": eventNames(), "decision": decisions} {
		c.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
	}
	return c
}

func (g *globals) queryAudit(f queryFlags, limited bool) (err error) {
	now := time.Now()
	if f.filter.Since, err = parseTime(f.since, now); err != nil {
		return usageError{fmt.Errorf("--since: %w", err)}
	}
	if f.filter.Until, err = parseTime(f.until, now); err != nil {
		return usageError{fmt.Errorf("--until: %w", err)}
	}
	if f.filter.Limit < 0 || f.filter.Limit > audit.MaxLimit {
		return usageError{fmt.Errorf("--limit: expected 0 to %d, got %d", audit.MaxLimit, f.filter.Limit)}
	}
	if err := f.checkWords(); err != nil {
		return usageError{err}
	}
	f.filter.Event = audit.Event(f.event)
	if f.json && !limited {
		f.filter.Limit = 0
	}
	if f.dir == "" {
		p, err := g.paths()
		if err != nil {
			return err
		}
		f.dir = p.AuditDir
	}
	if f.json {
		return auditHint(audit.Query(f.dir, f.filter, func(_ *audit.Record, line []byte) error {
			_, err := fmt.Fprintf(g.stdout, "%s\n", line)
			return err
		}))
	}
	t := recordTable{out: tabwriter.NewWriter(g.stdout, 0, 0, 2, ' ', 0)}
	return auditHint(errors.Join(audit.Query(f.dir, f.filter, t.row), t.out.Flush()))
}

// codeForm is that of all codes of refusals; which there are grows with releases.
var codeForm = regexp.MustCompile(`^[a-z]+(-[a-z]+)*$`)

// checkWords refuses words that no record ever has.
func (f *queryFlags) checkWords() error {
	for _, c := range []struct {
		flag, word string
		known      []string
	}{
		{"--event", f.event, eventNames()},
		{"--tier", f.filter.Tier, tiers},
		{"--decision", f.filter.Decision, decisions},
	} {
		if c.word != "" && !slices.Contains(c.known, c.word) {
			return fmt.Errorf("%s: expected one of %s, got %q", c.flag, strings.Join(c.known, ", "), c.word)
		}
	}
	if f.filter.Code != "" && !codeForm.MatchString(f.filter.Code) {
		return fmt.Errorf("--code: expected the code of a refusal such as no-policy, got %q", f.filter.Code)
	}
	return nil
}

// tiers and decisions are the words that records have there.
var (
	tiers     = []string{"service", inject.TierVM, inject.TierSNP, "container", "user"} // the last two in refusals alone
	decisions = []string{audit.Granted, audit.Refused}
)

func eventNames() (names []string) {
	for _, e := range audit.Events() {
		names = append(names, string(e))
	}
	return names
}

// parseTime reads a point in time; nothing is the zero time.
func parseTime(text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if ago, err := time.ParseDuration(text); err == nil && ago >= 0 {
		return now.Add(-ago), nil
	}
	for _, layout := range []string{time.RFC3339Nano, time.DateOnly} {
		if t, err := time.Parse(layout, text); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("expected a time like 2026-11-21T12:00:00Z, a date, or how long ago like 90m, got %q", text)
}

// recordTable prints records as rows. It is flushed now and then, so that a whole log need not fit into memory.
type recordTable struct {
	out  *tabwriter.Writer
	rows int
}

func (t *recordTable) row(r *audit.Record, _ []byte) error {
	if t.rows%1000 == 0 {
		if err := t.out.Flush(); err != nil {
			return err
		}
		fmt.Fprintln(t.out, "SEQ\tTIME\tEVENT\tTIER\tSUBJECT\tKEYS\tWHO\tCODE\tWHY")
	}
	t.rows++
	code := r.Code
	if r.Count > 0 {
		code = strings.TrimSpace(fmt.Sprintf("%s x%d", code, r.Count))
	}
	cells := []string{strconv.FormatUint(r.Seq, 10), r.Time.Format("2006-01-02T15:04:05.000Z"), string(r.Event), r.Tier, r.Subject,
		keysOf(r), whoOf(r), code, whyOf(r)}
	for i, c := range cells {
		cells[i] = plain.Line(c)
	}
	_, err := fmt.Fprintln(t.out, strings.TrimRight(strings.Join(cells, "\t"), "\t"))
	return err
}

func keysOf(r *audit.Record) string {
	keys := make([]string, len(r.Names))
	for i, n := range r.Names {
		if keys[i] = n; i < len(r.Epochs) && r.Epochs[i] > 1 {
			keys[i] += fmt.Sprintf("@%d", r.Epochs[i])
		}
	}
	return strings.Join(keys, ",")
}

func whoOf(r *audit.Record) string {
	if r.Caller == nil {
		return r.Peer
	}
	return strings.TrimSpace(fmt.Sprintf("uid %d %s", r.Caller.UID, r.Caller.Unit))
}

func whyOf(r *audit.Record) string {
	switch {
	case r.Reason != "":
		return r.Reason
	case r.Checkpoint != nil:
		return fmt.Sprintf("signs all up to record %d", r.Checkpoint.Seq)
	}
	return r.Rule
}

func newAuditResetCommand(g *globals) *cobra.Command {
	var reason string
	c := &cobra.Command{
		Use:   "reset --reason TEXT",
		Short: "Set a broken audit log aside and begin a new one",
		Long: `Set a broken audit log aside, so that the broker can start again: its files move into a folder beside them, which stays as evidence,
and a new log begins with a record of this. The broker must not run. A log that is whole is not reset.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if strings.TrimSpace(reason) == "" {
				return usageError{errors.New("--reason: expected why the log is reset; it is recorded")}
			}
			return g.resetAudit(cmd.Context(), reason)
		},
	}
	c.Flags().StringVar(&reason, "reason", "", "why, for the new log's first record: `TEXT`")
	return c
}

func (g *globals) resetAudit(ctx context.Context, reason string) error {
	file, p, err := g.loadRealm()
	if err != nil {
		return err
	}
	s, err := store.Open(p.Store)
	if err != nil {
		return auditHint(err)
	}
	defer s.Close()
	head, report, err := examineAudit(s, p.AuditDir)
	if err != nil {
		return err
	}
	aside, err := audit.SetAside(p.AuditDir, time.Now())
	if err != nil {
		return auditHint(fmt.Errorf("setting the audit log aside: %w", err))
	}
	if err := s.Update(func(tx store.Tx) error { return tx.Delete(audit.HeadBucket, audit.HeadKey) }); err != nil {
		return err
	}
	what := fmt.Sprintf("%s; the log before was gone, stored head %s", reason, head)
	if aside != "" {
		what = fmt.Sprintf("%s; set aside in %q: %s, broken in %s, stored head %s", reason, aside, several(report.Records, "record"),
			several(len(report.Breaks)+report.MoreBreaks, "place"), head)
	}
	if err := beginAudit(ctx, s, p, file.RealmID().String(), what); err != nil {
		return err
	}
	if aside == "" {
		g.warn("the audit log was reset; of the one before nothing was left")
		return nil
	}
	g.warn("the audit log was reset; the one before is in %s", aside)
	return nil
}

// examineAudit returns the stored head and what is broken, which must be something.
func examineAudit(s *store.Store, dir string) (audit.Head, *audit.Report, error) {
	var opts audit.VerifyOptions
	head, err := daemon.LoadHead(s)
	if err == nil && head.Seq > 0 {
		opts.Heads, opts.Stored = []audit.Head{head}, head
	}
	report, err := audit.Verify(dir, opts)
	if errors.Is(err, fs.ErrNotExist) && head.Seq > 0 { // the folder is gone: all of it is cut off
		return head, &audit.Report{Breaks: make([]audit.Break, 1)}, nil
	}
	if err != nil {
		return head, nil, auditHint(err)
	}
	if report.OK() {
		return head, nil, hintedError{errors.New("the audit log is whole: nothing to reset"),
			"old files may be moved away as they are, all but the newest; the rest still verifies"}
	}
	return head, report, nil
}

// beginAudit writes a new log's first record. The broker signs it at its next checkpoint.
func beginAudit(ctx context.Context, s *store.Store, p config.Paths, realm, reason string) error {
	l, err := audit.Open(audit.Config{
		Dir: p.AuditDir, Realm: realm,
		Sign: func(context.Context, ...[]byte) ([]byte, error) {
			return nil, errors.New("this command does not open the realm")
		},
		LoadHead: func() (audit.Head, error) { return audit.Head{}, nil },
		SaveHead: func(h audit.Head) error { return daemon.SaveHead(s, h) },
	})
	if err != nil {
		return err
	}
	_, err = l.Append(audit.Record{Event: audit.EventReset, Reason: reason}, audit.Durable)
	return errors.Join(err, l.Close(ctx))
}
