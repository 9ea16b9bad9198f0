package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/endorsements"
)

// Exit statuses of keybroker endorsements, besides those of all commands; they are documented and stay.
const (
	exitUnavailable exitStatus = 3
	exitNone        exitStatus = 4
	exitRefused     exitStatus = 5
)

const endorsementsHelp = `AMD's certificates and revocation lists for attestation reports are kept in a folder, so that a report can be verified without
a network: VCEKs by product line, chip and TCB; VLEKs by line, provider and TCB; their issuers (ASK, ASVK), roots (ARK) and the
roots' revocation lists. Everything is verified up to AMD's roots, which are built in, when it is stored and whenever it is read.

Exit status:
  0  done
  1  failed: a file or folder cannot be read or written
  2  the command line is wrong
  3  fetch: the key service cannot be reached, fails, or asks to wait for longer than --wait; try again later
  4  fetch: the key service does not have it
  5  fetch, import: what came does not verify, or is something else; nothing of it was stored
     verify: files were altered, or are no endorsements; they are never used`

func newEndorsementsCommand(g *globals) *cobra.Command {
	c := &cobra.Command{
		Use:   "endorsements",
		Short: "Keep AMD's certificates and revocation lists for attestation reports",
		Long:  endorsementsHelp,
	}
	var dir string
	c.PersistentFlags().StringVar(&dir, "endorsements", "", "the `DIR` of the store (default endorsements in the state folder)")
	c.AddCommand(newEndorsementsFetchCommand(g, &dir), newEndorsementsImportCommand(g, &dir), newEndorsementsListCommand(g, &dir), newEndorsementsVerifyCommand(g, &dir))
	return c
}

// endorsements returns the store in this folder, or in that of the state if it is "".
func (g *globals) endorsements(dir string, v *snp.Verifier) (*endorsements.Store, error) {
	paths, err := g.paths()
	if err != nil {
		return nil, err
	}
	if dir == "" {
		dir = paths.Endorsements
	}
	return endorsements.New(endorsements.Config{Dir: dir, Verifier: v})
}

// openEndorsements does so with AMD's roots, and makes the folder if something shall be put into it.
func (g *globals) openEndorsements(dir string, write bool) (*endorsements.Store, error) {
	v, err := g.verifier()
	if err != nil {
		return nil, err
	}
	s, err := g.endorsements(dir, v)
	if err != nil {
		return nil, err
	}
	if write {
		if err := endorsements.Make(s.Dir()); err != nil {
			return nil, endorsementsHint(s, err)
		}
	}
	return s, nil
}

// endorsementsHint adds what a user can do about an error of the store.
func endorsementsHint(s *endorsements.Store, err error) error {
	missing := (*snp.MissingIssuerError)(nil)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return hintedError{err, "run it as root, or choose another folder with --endorsements"}
	case errors.Is(err, fs.ErrNotExist):
		return hintedError{err, fmt.Sprintf("nothing was stored here yet, or there is no %s; --endorsements names another place", filepath.Dir(s.Dir()))}
	case errors.As(err, &missing):
		vlek := ""
		if missing.Kind == attest.VLEK {
			vlek = "--vlek "
		}
		return hintedError{err, fmt.Sprintf("import it together with its issuer's, or get that first: `keybroker endorsements fetch --product %s %s--ca`", missing.Line, vlek)}
	}
	return err
}

func newEndorsementsImportCommand(g *globals, dir *string) *cobra.Command {
	return &cobra.Command{
		Use:   "import FILE...",
		Short: "Store certificates and revocation lists from files",
		Long: `Store certificates and revocation lists from files: in DER, in PEM, as a table (configfs-tsm's auxblob), or as an extended report,
whose table is taken. All must verify, or nothing is stored; the issuers may be in any of the files, or stored already.

This is how a VLEK's certificate is stored: AMD gives it to the provider alone, whose hosts hand it to guests.

` + endorsementsHelp,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, files []string) error {
			var given attest.Endorsements
			for _, name := range files {
				if err := readImport(name, &given); err != nil {
					return err
				}
			}
			s, err := g.openEndorsements(*dir, true)
			if err != nil {
				return err
			}
			stored, err := s.Put(cmd.Context(), given, nil)
			if errors.Is(err, endorsements.ErrRefused) {
				err = statusError{err, exitRefused}
			}
			if err != nil {
				return endorsementsHint(s, err)
			}
			return g.printStored(stored)
		},
	}
}

// readImport reads certificates, also those behind a report.
func readImport(name string, dst *attest.Endorsements) error {
	octets, err := readBounded(name)
	if err != nil {
		return err
	}
	parse := snp.ParseFile
	if len(octets) >= snp.ReportSize {
		if _, err := snp.KeysOf(octets[:snp.ReportSize]); err == nil {
			octets, parse = octets[snp.ReportSize:], snp.ParseTable
		}
	}
	more, err := parse(octets)
	if err == nil && len(more.Certificates)+len(more.CRLs) == 0 {
		err = errors.New("expected certificates or revocation lists, got none")
	}
	if err != nil {
		return statusError{fmt.Errorf("reading %s: %w", name, err), exitRefused}
	}
	dst.Certificates = append(dst.Certificates, more.Certificates...)
	dst.CRLs = append(dst.CRLs, more.CRLs...)
	return nil
}

// printStored says what became of what was given.
func (g *globals) printStored(stored []endorsements.Stored) error {
	for _, s := range stored {
		what := "kept   " // what was there
		if s.New {
			what = "stored "
		}
		if _, err := fmt.Fprintln(g.stdout, what+s.File); err != nil {
			return err
		}
	}
	return nil
}

func newEndorsementsListCommand(g *globals, dir *string) *cobra.Command {
	asJSON := false
	c := &cobra.Command{
		Use:   "list",
		Short: "List what is stored",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			entries, _, err := g.listEndorsements(*dir)
			if err != nil {
				return err
			}
			if asJSON {
				return writeJSON(g.stdout, entries)
			}
			return g.printEndorsements(entries)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// An endorsement is a stored file, as list prints it.
type endorsement struct {
	File     string           `json:"file"`
	State    string           `json:"state"` // good, expired or refused
	Problem  string           `json:"problem,omitempty"`
	Kind     string           `json:"kind,omitempty"`
	Product  string           `json:"product,omitempty"`
	ChipID   string           `json:"chip_id,omitempty"`
	Provider string           `json:"provider,omitempty"`
	TCB      map[string]uint8 `json:"tcb,omitempty"`
	Serial   string           `json:"serial,omitempty"`
	From     *time.Time       `json:"from,omitempty"`
	Until    *time.Time       `json:"until,omitempty"`

	tcb string
}

// States of what is stored.
const (
	endorsementGood    = "good"
	endorsementExpired = "expired" // of a revocation list: there should be a newer one
	endorsementRefused = "refused" // it does not verify
)

// listEndorsements reads the whole store, and counts what is refused.
func (g *globals) listEndorsements(dir string) (out []endorsement, refused int, err error) {
	s, err := g.openEndorsements(dir, false)
	if err != nil {
		return nil, 0, err
	}
	entries, err := s.List()
	if err != nil {
		return nil, 0, endorsementsHint(s, err)
	}
	out = []endorsement{}
	for _, e := range entries {
		if e.Err != nil {
			refused++
		}
		out = append(out, describeEndorsement(e, time.Now()))
	}
	return out, refused, nil
}

func describeEndorsement(entry endorsements.Entry, now time.Time) endorsement {
	if entry.Err != nil {
		return endorsement{File: entry.File, State: endorsementRefused, Problem: entry.Err.Error()}
	}
	e := entry.Endorsement
	out := endorsement{
		File: entry.File, State: endorsementGood, Kind: e.Kind, Product: e.Line, ChipID: hex.EncodeToString(e.Key.Chip), Provider: e.Key.CSP,
		Serial: hex.EncodeToString(e.Serial), From: &e.From,
	}
	if !e.Until.IsZero() {
		out.Until = &e.Until
		if now.After(e.Until) {
			out.State = endorsementExpired
		}
	}
	if e.Key.Kind == "" {
		return out
	}
	out.Serial, out.tcb, out.TCB = "", snp.FormatTCB(e.Line, e.Key.TCB), map[string]uint8{}
	values := snp.TCBValues(e.Line, e.Key.TCB)
	for i, part := range snp.TCBParts(e.Line) {
		out.TCB[part] = values[i]
	}
	return out
}

func (g *globals) printEndorsements(entries []endorsement) error {
	t := tabwriter.NewWriter(g.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "STATE\tKIND\tPRODUCT\tOF\tTCB\tFROM\tUNTIL")
	for _, e := range entries {
		if e.State == endorsementRefused {
			fmt.Fprintf(t, "%s\t%s: %s\n", e.State, e.File, e.Problem)
			continue
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", e.State, e.Kind, e.Product, e.of(), orDash(e.tcb), e.From.UTC().Format(time.DateOnly), untilDate(e.Until))
	}
	return t.Flush()
}

// of says whose an endorsement is.
func (e *endorsement) of() string {
	switch {
	case e.ChipID != "":
		return "chip " + short(e.ChipID)
	case e.Provider != "":
		return fmt.Sprintf("provider %.60q", e.Provider)
	case e.Serial != "":
		return "number " + short(e.Serial)
	}
	return "-"
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func untilDate(t *time.Time) string {
	if t == nil {
		return "-"
	}
	return t.UTC().Format(time.DateOnly)
}

func newEndorsementsVerifyCommand(g *globals, dir *string) *cobra.Command {
	return &cobra.Command{
		Use:   "verify",
		Short: "Verify everything that is stored, and name what was altered",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			entries, refused, err := g.listEndorsements(*dir)
			if err != nil {
				return err
			}
			for _, e := range entries {
				switch e.State {
				case endorsementRefused:
					fmt.Fprintf(g.stdout, "refused %s: %s\n", e.File, e.Problem)
				case endorsementExpired:
					g.warn("%s: ended %s", e.File, e.Until.UTC().Format(time.RFC3339))
				}
			}
			fmt.Fprintf(g.stdout, "%s, %d refused\n", several(len(entries), "file"), refused)
			if refused > 0 {
				g.hint("what is refused is never used; fetch or import it again, which replaces it, or remove the file")
				return exitRefused
			}
			return nil
		},
	}
}
