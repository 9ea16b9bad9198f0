package snp_test

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-sev-guest/kds"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/snptest"
)

// vectors is where the reports of real processors are; see the README there.
const vectors = "../../../shared/vectors/snp"

// A sample is a real report with its certificate.
type sample struct {
	name, cert, issuers string // files below vectors; issuers may be empty
	line                string
	kind                string
	at                  time.Time
	report, key         []byte
}

// spring is a day on which all certificates but the VLEK's are valid.
var spring = time.Date(2026, 4, 1, 0, 0, 0, 0, time.UTC)

func allSamples(t testing.TB) []sample {
	t.Helper()
	list := []sample{
		{name: "milan-v2-a", cert: "vcek", line: snp.Milan, kind: attest.VCEK, at: spring},
		{name: "milan-v2-b", cert: "vcek", line: snp.Milan, kind: attest.VCEK, at: spring},
		{name: "milan-v3-vlek", cert: "vlek", issuers: "milan.ask-ark-asvk.pem", line: snp.Milan, kind: attest.VLEK, at: time.Date(2025, 6, 1, 0, 0, 0, 0, time.UTC)},
		{name: "zen4c-v5", cert: "vcek", line: snp.Genoa, kind: attest.VCEK, at: spring},
		{name: "milan-v2-debug", cert: "vcek", line: snp.Milan, kind: attest.VCEK, at: spring},
	}
	for i := range list {
		list[i].report = vector(t, list[i].name+".report.bin")
		list[i].key = vector(t, list[i].name+"."+list[i].cert+".der")
	}
	return list
}

func vector(t testing.TB, name string) []byte {
	t.Helper()
	octets, err := os.ReadFile(filepath.Join(vectors, name))
	if err != nil {
		t.Fatalf("the samples must be there: %v", err)
	}
	return octets
}

// endorsements are the sample's certificates, with those of its issuers that the verifier does not have.
func (s sample) endorsements(t testing.TB) attest.Endorsements {
	t.Helper()
	e := attest.Endorsements{Certificates: [][]byte{s.key}}
	if s.issuers != "" {
		more, err := snp.ParseFile(vector(t, s.issuers))
		if err != nil {
			t.Fatal(err)
		}
		e.Certificates = append(e.Certificates, more.Certificates...)
	}
	return e
}

// request asks about a sample, with a policy that accepts exactly it.
func (s sample) request(t testing.TB) snp.Request {
	return snp.Request{
		Evidence:     attest.Evidence{Kind: attest.KindSNP, Octets: s.report},
		Endorsements: s.endorsements(t),
		ReportData:   s.report[0x50:0x90],
		Policy:       s.policy(),
		At:           s.at,
	}
}

// policy accepts the sample, unless it could be debugged.
func (s sample) policy() *attest.Policy {
	p := production(s.line)
	r := s.report
	p.Measurements = one("image", r[0x90:0xc0])
	p.HostData = one("guest", r[0xc0:0xe0])
	p.VMPLs = []uint32{binary.LittleEndian.Uint32(r[0x30:])}
	if s.kind == attest.VLEK {
		p.Signers, p.CSPs, p.AllowMaskedChip = []string{attest.VLEK}, []string{"CN=cc-us-east-2.amazonaws.com"}, true
	}
	return p
}

// production is a policy that is complete but for measurement and HOST_DATA, which it has as zeros.
func production(line string) *attest.Policy {
	least := &attest.TCB{Bootloader: 2, SNP: 5, Microcode: 27}
	if line == snp.Turin {
		least = &attest.TCB{Microcode: 9}
	}
	return &attest.Policy{
		Rule: "test", Signers: []string{attest.VCEK}, VMPLs: []uint32{0}, CRL: attest.CRLWhenGiven,
		Products:     []attest.Product{{Line: line, Reported: least, Committed: least, Launch: least, Rule: "test product " + line}},
		Measurements: one("image", make([]byte, 48)), HostData: one("guest", make([]byte, 32)),
		Guest: attest.GuestPolicy{AllowSMT: true},
	}
}

func one(name string, value []byte) attest.ReferenceValues {
	return attest.ReferenceValues{{Name: name, Value: bytes.Clone(value), Rule: "test " + name}}
}

func verifier(t testing.TB, roots ...snp.Root) *snp.Verifier {
	t.Helper()
	if len(roots) == 0 {
		roots = snp.AMDRoots()
	}
	v, err := snp.New(snp.Config{Roots: roots})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// failing returns the names of the claims that fail.
func failing(v *attest.Verdict) []string {
	var out []string
	for _, c := range v.Failures() {
		out = append(out, c.Name)
	}
	return out
}

// documented is the table of claims in docs/attestation.md: the names of each part.
var documented = sync.OnceValue(func() map[attest.Part]map[string]bool {
	page, err := os.ReadFile("../../docs/attestation.md")
	if err != nil {
		panic(err)
	}
	_, table, _ := strings.Cut(string(page), "| part | claims |\n|---|---|\n")
	out := map[attest.Part]map[string]bool{}
	for line := range strings.Lines(table) {
		words := strings.Split(line, "`")
		if len(words) < 4 {
			break
		}
		names := map[string]bool{}
		for i := 3; i < len(words); i += 2 {
			names[words[i]] = true
		}
		out[attest.Part(words[1])] = names
	}
	return out
})

// generic are names of claims that end in that of a part, a flag or a key.
var generic = map[string]string{
	"reported-tcb": "PART", "committed-tcb": "PART", "launch-tcb": "PART", "guest-policy": "NAME", "platform": "NAME", "policy": "KEY",
}

// wantDocumented holds that all claims of a verdict are in the page, in their part.
func wantDocumented(t *testing.T, v *attest.Verdict) {
	t.Helper()
	for _, c := range v.Claims() {
		name := c.Name
		if first, _, _ := strings.Cut(name, "."); generic[first] != "" && first != name {
			name = first + "." + generic[first]
		}
		if c.Rule != "" && !documented()[c.Part][name] { // what has no rule was only told
			t.Errorf("docs/attestation.md does not have %s in %s", name, c.Part)
		}
	}
}

// wantFailures holds that a verdict refuses for these claims and no other.
func wantFailures(t *testing.T, v *attest.Verdict, names ...string) {
	t.Helper()
	wantDocumented(t, v)
	got := failing(v)
	if !slices.Equal(got, names) || v.Pass() != (len(names) == 0) {
		t.Errorf("pass %v, failing %q, expected %q", v.Pass(), got, names)
		for _, c := range v.Claims() {
			if c.Result != attest.Holds {
				t.Logf("%+v", c)
			}
		}
	}
}

// Each sample is judged as the README beside it says.
func TestSamples(t *testing.T) {
	v := verifier(t)
	for _, s := range allSamples(t) {
		t.Run(s.name, func(t *testing.T) {
			verdict := v.Appraise(s.request(t))
			if !verdict.All(attest.Genuine()) || verdict.Of(attest.Binding) != attest.Holds {
				t.Errorf("failing: %q", failing(verdict))
			}
			if s.name == "milan-v2-debug" {
				wantFailures(t, verdict, "guest-policy.debug")
				return
			}
			wantFailures(t, verdict)
			if len(verdict.Instance) != 32 {
				t.Errorf("REPORT_ID has %d octets", len(verdict.Instance))
			}
			for _, c := range verdict.Claims() {
				if c.Name == "" || c.Expected == "" || c.Got == "" || c.Rule == "" {
					t.Errorf("a claim does not say everything: %+v", c)
				}
			}
		})
	}
}

func sampleNamed(t testing.TB, name string) sample {
	t.Helper()
	for _, s := range allSamples(t) {
		if s.name == name {
			return s
		}
	}
	t.Fatalf("no sample %s", name)
	return sample{}
}

// brokenNetwork is one that nothing may use.
type brokenNetwork struct{ t *testing.T }

func (n brokenNetwork) RoundTrip(r *http.Request) (*http.Response, error) {
	n.t.Errorf("a request for %s", r.URL)
	return nil, errors.New("no network")
}

// Nothing is asked of the network, also when certificates are missing, which the library would fetch.
func TestNoNetwork(t *testing.T) {
	old := http.DefaultTransport
	http.DefaultTransport = brokenNetwork{t}
	defer func() { http.DefaultTransport = old }()
	for _, s := range allSamples(t) {
		r := s.request(t)
		for n := range r.Endorsements.Certificates {
			r.Endorsements.Certificates = r.Endorsements.Certificates[:n]
			verifier(t).Appraise(r)
		}
	}
}

// By the clock of today the VLEK has expired; without its ASVK the missing certificate is named.
func TestVLEK(t *testing.T) {
	v, s := verifier(t), sampleNamed(t, "milan-v3-vlek")
	r := s.request(t)
	r.At = time.Now()
	wantFailures(t, v.Appraise(r), "certificate-validity")

	r = s.request(t)
	r.Endorsements.Certificates = r.Endorsements.Certificates[:1]
	verdict := v.Appraise(r)
	wantFailures(t, verdict, "issuer")
	if c := verdict.Failures()[0]; !strings.Contains(c.Expected, "SEV-VLEK-Milan (ASVK)") || c.Got != "none given" {
		t.Errorf("%+v", c)
	}

	r = s.request(t)
	r.Policy.AllowMaskedChip = false
	wantFailures(t, v.Appraise(r), "masked-chip-id")

	r = s.request(t)
	r.Policy.CSPs = []string{"CN=another"}
	wantFailures(t, v.Appraise(r), "csp")

	r = s.request(t) // which chip it is, nobody knows
	r.Policy.Chips, r.Policy.DenyChips = one("chip", make([]byte, 64)), one("chip", make([]byte, 64))
	wantFailures(t, v.Appraise(r), "chip-id", "deny-chip-id")
}

// The certificate of a Turin processor, of which there is no report.
func TestTurinCertificate(t *testing.T) {
	v := verifier(t)
	for _, issuers := range []string{"turin.chain.pem", "turin.ask-ark-asvk.pem", ""} {
		e := attest.Endorsements{Certificates: [][]byte{vector(t, "turin.vcek.der")}}
		if issuers != "" {
			more, err := snp.ParseFile(vector(t, issuers))
			if err != nil {
				t.Fatal(err)
			}
			e.Certificates = append(e.Certificates, more.Certificates...)
		}
		verdict := v.AppraiseCertificates(e, spring)
		if !verdict.All([]attest.Part{attest.Chain, attest.Validity, attest.Revocation}) || len(failing(verdict)) > 0 || verdict.Pass() {
			t.Errorf("%s: failing %q, pass %v", issuers, failing(verdict), verdict.Pass())
		}
		i := slices.IndexFunc(verdict.Claims(), func(c attest.Claim) bool { return c.Name == "certificate-tcb" })
		if got := verdict.Claims()[i].Got; got != "fmc 0, bootloader 0, tee 0, snp 0, microcode 9" {
			t.Errorf("TCB %q", got)
		}
	}
}

// The roots that are compiled in are those of the samples.
func TestRoots(t *testing.T) {
	roots := snp.AMDRoots()
	for _, r := range roots {
		published, err := snp.ParseRoot(r.Line, vector(t, strings.ToLower(r.Line)+".ask-ark-asvk.pem"))
		if err != nil {
			t.Fatal(err)
		}
		if !r.ARK.Equal(published.ARK) || len(r.Intermediates) != 1 || !slices.ContainsFunc(published.Intermediates, r.Intermediates[0].Equal) {
			t.Errorf("%s: other certificates than AMD published", r.Line)
		}
	}
	if len(roots) != 3 {
		t.Errorf("%d roots", len(roots))
	}
	for name, c := range map[string]snp.Config{
		"none": {}, "no line": {Roots: []snp.Root{{Line: "Rome", ARK: roots[0].ARK}}}, "no root": {Roots: []snp.Root{{Line: snp.Milan}}},
		"no CA": {Roots: []snp.Root{{Line: snp.Milan, ARK: mustParse(t, vector(t, "milan-v2-a.vcek.der"))}}},
		"nil":   {Roots: []snp.Root{{Line: snp.Milan, ARK: roots[0].ARK, Intermediates: []*x509.Certificate{nil}}}},
	} {
		if v, err := snp.New(c); err == nil || v != nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func mustParse(t testing.TB, der []byte) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

var authorities sync.Map // line to a function that makes the test authority once

// authority returns the test authority of a line.
func authority(t testing.TB, line string) *snptest.Authority {
	t.Helper()
	once, _ := authorities.LoadOrStore(line, sync.OnceValues(func() (*snptest.Authority, error) { return snptest.New(line) }))
	a, err := once.(func() (*snptest.Authority, error))()
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// Where the key service has the certificates: as AMD's 57230 says it, and for what go-sev-guest knows, as that does.
func TestKeyServicePaths(t *testing.T) {
	for name, want := range map[string]string{
		"milan-v2-a": "", "milan-v3-vlek": "",
		"zen4c-v5": "/vcek/v1/Genoa/b5f9a4c8280e63c97d288db6648577dc2b848884aa682d7a227ba40e50deb2b0d112b599d87aaccda78d06f4254b1e81c4d953ef3c699db39d4e06013e9fa4ce" +
			"?blSPL=10&teeSPL=0&snpSPL=27&ucodeSPL=27",
	} {
		report := sampleNamed(t, name).report
		if got := snp.VCEKPath(report); got != want {
			t.Errorf("%s: %s", name, got)
		}
		tcb := kds.TCBVersion(binary.LittleEndian.Uint64(report[0x180:]))
		if want != "" && "https://kdsintf.amd.com"+want != kds.VCEKCertURL("Genoa", report[0x1a0:0x1e0], tcb) {
			t.Errorf("%s: the library has %s", name, kds.VCEKCertURL("Genoa", report[0x1a0:0x1e0], tcb))
		}
	}
	if got, want := snp.VCEKPath(turin(t).report), "/vcek/v1/Turin/b5f9a4c8280e63c9?fmcSPL=3&blSPL=1&teeSPL=2&snpSPL=4&ucodeSPL=77"; got != want {
		t.Error(got)
	}
	if got := snp.ChainPath(snp.Milan, attest.VLEK); got != "/vlek/v1/Milan/cert_chain" {
		t.Error(got)
	}
	if snp.VCEKPath(nil) != "" {
		t.Error("nothing has a path")
	}
}
