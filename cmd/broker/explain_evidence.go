package main

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/keyservice"
	"keybroker/derive"
	"keybroker/internal/policy"
)

// evidenceHelp is the part of explain's help about evidence.
const evidenceHelp = `With --evidence, appraise an SEV-SNP attestation report, offline: no broker and no network are asked. The file is a report, or
one with its table of certificates behind it (as extended reports have it). Further certificates, and revocation lists, come with
--certs: in DER, in PEM, or as a table (configfs-tsm's auxblob; its outblob is the report), and from the store of endorsements (see
keybroker endorsements). AMD's ARKs and ASKs are built in, ASVKs are not. --policy names an appraisal policy in a file of its own;
with --vm it is that of a VM in this host's policy. Without both only the evidence itself is judged, without --report-data not for
which session it was made.
With --certs alone the certificate of a VCEK or VLEK is judged.

Exit status: 0 when all that was asked for holds, otherwise that of the first part which does not:
  1  it could not be judged (a file cannot be read)      6  validity: a certificate has expired, or begins later
  2  the command line is wrong                           7  revocation: revoked, or no revocation list where one is required
  3  form: malformed, unknown version or processor       8  binding: REPORT_DATA is another session's
  4  signature: wrong, or another chip's or TCB's        9  policy: it does not accept what the report says
  5  chain: a certificate is missing, or not AMD's`

// evidenceStatus is the exit status for each part of a verdict; it is documented and stays.
var evidenceStatus = map[attest.Part]exitStatus{
	attest.Form: 3, attest.Signature: 4, attest.Chain: 5, attest.Validity: 6, attest.Revocation: 7, attest.Binding: 8, attest.Appraisal: 9,
}

// evidenceFlags are what explain takes about evidence.
type evidenceFlags struct {
	report     string
	certs      []string
	vm         string
	store      string
	reportData string
	at         string
}

// add defines the flags.
func (f *evidenceFlags) add(g *globals, c *cobra.Command) {
	c.Flags().StringVar(&f.report, "evidence", "", "`FILE` with an SEV-SNP report; --policy is then an appraisal policy")
	c.Flags().StringVar(&f.vm, "vm", "", "with --evidence: judge it by the entry of this VM, `NAME` or UUID, in policy.toml and its drop-ins")
	c.Flags().StringArrayVar(&f.certs, "certs", nil, "`FILE` with certificates or revocation lists; may be repeated")
	c.Flags().StringVar(&f.store, "endorsements", "", "`DIR` with stored certificates and revocation lists (default endorsements in the state folder, if it can be read)")
	c.Flags().StringVar(&f.reportData, "report-data", "", "the REPORT_DATA that the session wants, 128 hexadecimal `DIGITS`")
	c.Flags().StringVar(&f.at, "at", "", "judge as of this `DATE`, such as 2026-01-31 or 2026-01-31T12:00:00Z (default now)")
	c.RegisterFlagCompletionFunc("vm", g.completeVM)
	for _, mine := range []string{"evidence", "vm", "certs", "endorsements", "report-data", "at"} {
		c.MarkFlagsMutuallyExclusive(mine, "uid")
		c.MarkFlagsMutuallyExclusive(mine, "unit")
	}
}

// asked reports whether explain is about evidence.
func (f *evidenceFlags) asked() bool {
	return f.report != "" || f.vm != "" || len(f.certs) > 0 || f.store != "" || f.reportData != "" || f.at != ""
}

// explainEvidence appraises a report, or certificates alone.
func (g *globals) explainEvidence(f evidenceFlags, asJSON bool) error {
	r, err := g.evidenceRequest(f)
	if err != nil {
		return err
	}
	v, err := g.verifier()
	if err != nil {
		return err
	}
	if err := g.addStored(f.store, v, &r); err != nil {
		return err
	}
	e := evidenceExplanation{At: r.At.UTC()}
	if f.report == "" {
		e.judgeCertificates(v.AppraiseCertificates(r.Endorsements, r.At))
	} else {
		e.judge(v.Appraise(r), asked(r))
	}
	if asJSON {
		err = writeJSON(g.stdout, e)
	} else {
		err = e.print(g.stdout)
	}
	if err != nil || e.ExitStatus == 0 {
		return err
	}
	g.hintMissing(f.report, r.Evidence.Octets, e.Claims)
	return e.ExitStatus
}

// hintMissing says where a certificate can be had that is missing: explain asks nobody.
func (g *globals) hintMissing(file string, evidence []byte, claims []attest.Claim) {
	for _, c := range claims {
		switch {
		case c.Result != attest.Fails || c.Got != snp.NoneGiven:
		case c.Name == "issuer":
			for _, line := range snp.Lines() {
				if strings.Contains(c.Expected, "SEV-VLEK-"+line) {
					g.hint("%s%s has it; give it with --certs, or run `keybroker endorsements fetch --product %s --vlek --ca`", keyservice.AMD, snp.ChainPath(line, attest.VLEK), line)
				}
			}
		case c.Name == "certificate" && len(evidence) >= snp.ReportSize:
			keys, _ := snp.KeysOf(evidence[:snp.ReportSize])
			switch path := snp.VCEKPath(evidence[:snp.ReportSize]); {
			case path != "":
				g.hint("%s%s has it; give it with --certs, or run `keybroker endorsements fetch --evidence %s`", keyservice.AMD, path, file)
			case len(keys) > 1 && keys[0].Path() != "":
				g.hint("version 2 does not say of which line the processor is; if it is of %s, run `keybroker endorsements fetch --evidence %s --product %s`", keys[0].Line, file, keys[0].Line)
			}
		}
	}
}

// verifier trusts AMD's roots.
func (g *globals) verifier() (*snp.Verifier, error) {
	roots := g.roots
	if roots == nil {
		roots = snp.AMDRoots()
	}
	return snp.New(snp.Config{Roots: roots})
}

// addStored adds what the store has for a report, or for certificates that are judged alone. Nobody needs to have a store, but
// one that is named must be there.
func (g *globals) addStored(dir string, v *snp.Verifier, r *snp.Request) error {
	named := dir != ""
	store, err := g.endorsements(dir, v)
	if err != nil {
		return err
	}
	found, problems := store.Find(requestKeys(r)...)
	for _, err := range problems {
		absent := errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)
		switch {
		case absent && named:
			return err
		case !absent:
			g.warn("endorsements: not used: %v", err)
		}
	}
	r.Endorsements.Certificates = append(r.Endorsements.Certificates, found.Certificates...)
	r.Endorsements.CRLs = append(r.Endorsements.CRLs, found.CRLs...)
	return nil
}

// requestKeys returns the keys that a request is about, as far as it can be read.
func requestKeys(r *snp.Request) []snp.Key {
	if len(r.Evidence.Octets) >= snp.ReportSize {
		keys, _ := snp.KeysOf(r.Evidence.Octets[:snp.ReportSize]) // the verdict says what is wrong with it
		return keys
	}
	var keys []snp.Key
	for _, der := range r.Endorsements.Certificates {
		if k, err := snp.KeyOf(der); err == nil {
			keys = append(keys, k)
		}
	}
	return keys
}

// asked are the parts that the command line wants judged.
func asked(r snp.Request) []attest.Part {
	parts := attest.Genuine()
	if r.ReportData != nil {
		parts = append(parts, attest.Binding)
	}
	if r.Policy != nil {
		parts = append(parts, attest.Appraisal)
	}
	return parts
}

// evidenceRequest reads what the flags name.
func (g *globals) evidenceRequest(f evidenceFlags) (snp.Request, error) {
	r := snp.Request{At: time.Now()}
	if f.at != "" {
		at, err := policy.ParseDate(f.at)
		if err != nil {
			return r, usageError{fmt.Errorf("--at: %w", err)}
		}
		r.At = at
	}
	if err := readReportData(f.reportData, &r); err != nil {
		return r, err
	}
	if f.report == "" && (r.ReportData != nil || g.policy != "" || f.vm != "" || len(f.certs) == 0) {
		return r, usageError{errors.New("--evidence is missing: without a report there is nothing to judge but --certs")}
	}
	if err := readReport(f.report, &r); err != nil {
		return r, err
	}
	for _, name := range f.certs {
		if err := readEndorsements(name, &r.Endorsements); err != nil {
			return r, err
		}
	}
	return r, g.chooseAppraisalPolicy(f.vm, &r)
}

// chooseAppraisalPolicy takes the appraisal policy that the flags name, if they name one, and says where it is weak.
func (g *globals) chooseAppraisalPolicy(vm string, r *snp.Request) (err error) {
	switch {
	case vm != "":
		r.Policy, err = g.appraisalPolicyOf(vm)
	case g.policy != "":
		r.Policy, err = readAppraisalPolicy(g.policy)
	}
	if err != nil || r.Policy == nil {
		return err
	}
	for _, w := range r.Policy.Warnings(r.At) {
		g.warn("%s", w)
	}
	return nil
}

func readReportData(digits string, r *snp.Request) error {
	if digits == "" {
		return nil
	}
	octets, err := hex.DecodeString(digits)
	if err != nil || len(octets) != snp.ReportDataSize {
		return usageError{fmt.Errorf("--report-data: expected %d hexadecimal digits, got %d characters", 2*snp.ReportDataSize, len(digits))}
	}
	r.ReportData = octets
	return nil
}

// readReport reads the evidence, if there is to be any.
func readReport(name string, r *snp.Request) error {
	if name == "" {
		return nil
	}
	octets, err := readBounded(name)
	if err != nil {
		return err
	}
	r.Evidence = attest.Evidence{Kind: attest.KindSNP, Octets: octets}
	if e, err := snp.ParseFile(octets); err == nil && len(e.Certificates)+len(e.CRLs) > 0 {
		return hintedError{fmt.Errorf("reading %s: expected a report, got certificates", name), "give certificates with --certs"}
	}
	return nil
}

func readEndorsements(name string, dst *attest.Endorsements) error {
	octets, err := readBounded(name)
	if err != nil {
		return err
	}
	more, err := snp.ParseFile(octets)
	if err != nil {
		return statusError{fmt.Errorf("reading %s: %w", name, err), evidenceStatus[attest.Form]}
	}
	dst.Certificates = append(dst.Certificates, more.Certificates...)
	dst.CRLs = append(dst.CRLs, more.CRLs...)
	return nil
}

// appraisalPolicyOf returns what the reports of a VM are appraised with on this host.
func (g *globals) appraisalPolicyOf(nameOrUUID string) (*attest.Policy, error) {
	paths, err := g.paths()
	if err != nil {
		return nil, err
	}
	p, err := policy.Load(policy.Source{File: paths.PolicyFile, Dir: paths.PolicyDir, Required: true})
	if err != nil {
		return nil, err
	}
	entries := p.Find(nameOrUUID)
	if len(entries) == 0 {
		return nil, fmt.Errorf("no [[vm]] entry in the policy has the name or UUID %.60q", nameOrUUID)
	}
	if len(entries) > 1 {
		return nil, hintedError{fmt.Errorf("%s and %s have the same name", entries[0].Rule, entries[1].Rule), "name the VM by its UUID"}
	}
	v, d := p.VM(policy.VMClaims{UUID: entries[0].UUID, Tier: derive.TierSNP})
	if !d.Allow {
		return nil, fmt.Errorf("no report gets keys by %s: expected %s", d.Rule, d.Expected)
	}
	return v.SNP, nil
}

// readAppraisalPolicy reads one that is a file of its own.
func readAppraisalPolicy(name string) (*attest.Policy, error) {
	octets, err := readBounded(name)
	if err != nil {
		return nil, err
	}
	p, err := policy.ParseSNP(filepath.Base(name), octets)
	if err != nil {
		return nil, hintedError{err, "if this is a whole policy, name one of its VMs with --vm"}
	}
	return p, nil
}

// maxInput is how many octets a file given to explain may have.
const maxInput = 1 << 20

func readBounded(name string) ([]byte, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	octets, err := io.ReadAll(io.LimitReader(file, maxInput+1))
	if err != nil {
		return nil, err
	}
	if len(octets) > maxInput {
		return nil, fmt.Errorf("reading %s: expected at most %d octets, got more", name, maxInput)
	}
	return octets, nil
}

// evidenceExplanation is what explain says of evidence; it is also the JSON.
type evidenceExplanation struct {
	Verdict    string                        `json:"verdict"` // accepted, genuine or refused
	Pass       bool                          `json:"pass"`    // every part holds: a broker would release
	ExitStatus exitStatus                    `json:"exit_status"`
	At         time.Time                     `json:"at"`
	Parts      map[attest.Part]attest.Result `json:"parts"`
	Claims     []attest.Claim                `json:"claims"`
	remark     string
}

// judge fills in what a verdict on a report says about these parts.
func (e *evidenceExplanation) judge(v *attest.Verdict, parts []attest.Part) {
	e.fill(v, parts)
	var unasked []string
	if !slices.Contains(parts, attest.Binding) {
		unasked = append(unasked, "binding (--report-data)")
	}
	if !slices.Contains(parts, attest.Appraisal) {
		unasked = append(unasked, "policy (--policy or --vm)")
	}
	if len(unasked) > 0 {
		e.remark = "; not checked: " + strings.Join(unasked, ", ")
	}
}

// judgeCertificates does so with a verdict on certificates alone. Their form has claims only where it fails.
func (e *evidenceExplanation) judgeCertificates(v *attest.Verdict) {
	parts := []attest.Part{attest.Chain, attest.Validity, attest.Revocation}
	if v.Of(attest.Form) == attest.Fails {
		parts = append(parts, attest.Form)
	}
	e.fill(v, parts)
	e.remark = "; certificates alone, no report"
}

func (e *evidenceExplanation) fill(v *attest.Verdict, parts []attest.Part) {
	e.Pass, e.Claims = v.Pass(), v.Claims()
	e.Parts = map[attest.Part]attest.Result{}
	for _, p := range attest.Parts() {
		e.Parts[p] = v.Of(p)
	}
	e.Verdict, e.ExitStatus = "accepted", firstStatus(v, parts)
	switch {
	case e.ExitStatus != 0:
		e.Verdict = "refused"
	case !slices.Contains(parts, attest.Appraisal):
		e.Verdict = "genuine"
	}
}

// firstStatus returns the status of the first part that fails; of the first that could not be checked if none fails; 0 if all
// of these parts hold.
func firstStatus(v *attest.Verdict, parts []attest.Part) exitStatus {
	for _, wrong := range []attest.Result{attest.Fails, attest.Unchecked} {
		for _, p := range attest.Parts() {
			if slices.Contains(parts, p) && v.Of(p) == wrong {
				return evidenceStatus[p]
			}
		}
	}
	return 0
}

// long finds hexadecimal that is too long for a table.
var long = regexp.MustCompile(`[0-9a-f]{41,}`)

// short shortens what is too long for a table. JSON has it whole, and so has the line of a claim that fails.
func short(s string) string {
	s = long.ReplaceAllStringFunc(s, func(digits string) string { return digits[:16] + "..." + digits[len(digits)-8:] })
	if runes := []rune(s); len(runes) > 90 {
		s = string(runes[:87]) + "..."
	}
	return s
}

// print writes the table, what fails, and the verdict.
func (e *evidenceExplanation) print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "RESULT\tPART\tCLAIM\tEXPECTED\tGOT\tRULE")
	for _, c := range e.Claims {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", c.Result, c.Part, c.Name, short(c.Expected), short(c.Got), cmp.Or(c.Rule, "-"))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, c := range e.Claims {
		if c.Result == attest.Fails {
			fmt.Fprintf(w, "refused, %s: %s: expected %s, got %s (%s)\n", c.Part, c.Name, c.Expected, c.Got, c.Rule)
		}
	}
	_, err := fmt.Fprintf(w, "verdict: %s%s\n", e.Verdict, e.remark)
	return err
}
