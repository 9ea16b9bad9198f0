package snp_test

import (
	"bytes"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/snptest"
)

// signed is how many octets of a report the signature covers.
const signed = 672

// with returns a copy of octets with these from at on.
func with(octets []byte, at int, b ...byte) []byte {
	out := bytes.Clone(octets)
	copy(out[at:], b)
	return out
}

// tally counts verdicts by the claims that fail.
type tally map[string]int

func (n tally) count(v *attest.Verdict) {
	for _, name := range failing(v) {
		n[name]++
	}
}

func (n tally) String() string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(n)) {
		out = append(out, fmt.Sprintf("%s %d", name, n[name]))
	}
	return strings.Join(out, ", ")
}

// Every single-bit flip of the signed part is refused. What can still be read fails by its signature, whatever else fails.
func TestFlippedBits(t *testing.T) {
	v := verifier(t)
	for _, s := range allSamples(t) {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			r, n := s.request(t), tally{}
			for bit := 0; bit < signed*8; bit += stride {
				r.Evidence.Octets = with(s.report, bit/8, s.report[bit/8]^1<<(bit%8))
				verdict := v.Appraise(r)
				n.count(verdict)
				if verdict.Pass() || verdict.All(attest.Genuine()) {
					t.Fatalf("bit %d of octet %#x: passes", bit%8, bit/8)
				}
				missing := slices.Contains(failing(verdict), "certificate") // of the kind of key that the flip asks for
				if verdict.Of(attest.Form) == attest.Holds && verdict.Of(attest.Signature) != attest.Fails && !missing {
					t.Errorf("bit %d of octet %#x: the signature is not what fails: %q", bit%8, bit/8, failing(verdict))
				}
			}
			t.Logf("%d flips refused: %s", signed*8/stride, n)
		})
	}
}

// A signature that was changed in any octet, or that is zero, is none.
func TestChangedSignature(t *testing.T) {
	v := verifier(t)
	s := sampleNamed(t, "zen4c-v5")
	r := s.request(t)
	for at := signed; at < snp.ReportSize; at++ {
		r.Evidence.Octets = with(s.report, at, s.report[at]^1)
		if verdict := v.Appraise(r); verdict.Pass() {
			t.Fatalf("octet %#x: passes", at)
		}
	}
	r.Evidence.Octets = with(s.report, signed, make([]byte, snp.ReportSize-signed)...)
	wantFailures(t, v.Appraise(r), "signature")
}

// Every report with every other certificate is refused, and the failing claims say that it is another chip's.
func TestSwappedCertificates(t *testing.T) {
	v, n := verifier(t), tally{}
	pairs := 0
	turin := vector(t, "turin.vcek.der")
	for _, s := range allSamples(t) {
		others := append(allSamples(t), sample{name: "turin", key: turin})
		for _, other := range others {
			if other.name == s.name {
				continue
			}
			pairs++
			r := s.request(t)
			r.Endorsements.Certificates[0] = other.key
			verdict := v.Appraise(r)
			n.count(verdict)
			if verdict.Pass() || verdict.All(attest.Genuine()) {
				t.Errorf("%s with the certificate of %s passes", s.name, other.name)
			}
			if f := failing(verdict); !slices.Contains(f, "signature") && !slices.Contains(f, "certificate") {
				t.Errorf("%s with the certificate of %s: failing %q", s.name, other.name, f)
			}
		}
	}
	t.Logf("%d pairs refused: %s", pairs, n)
}

// All certificates at once do no harm: the one that fits is found.
func TestManyCertificates(t *testing.T) {
	v := verifier(t)
	for _, s := range allSamples(t) {
		r := s.request(t)
		for _, other := range allSamples(t) {
			r.Endorsements.Certificates = append(slices.Clone(other.endorsements(t).Certificates), r.Endorsements.Certificates...)
		}
		if verdict := v.Appraise(r); !verdict.All(attest.Genuine()) {
			t.Errorf("%s: failing %q", s.name, failing(verdict))
		}
	}
}

// resigned is a sample's report signed anew under a test authority, and a request about it.
type resigned struct {
	authority *snptest.Authority
	template  snptest.Template
	report    []byte
	policy    *attest.Policy
}

// resign takes a Milan or Genoa sample.
func resign(t testing.TB, s sample) resigned {
	tcb := s.report[0x180:]
	out := resigned{authority: authority(t, s.line), report: s.report, policy: s.policy()}
	out.template = snptest.Template{Kind: s.kind, TCB: attest.TCB{Bootloader: tcb[0], TEE: tcb[1], SNP: tcb[6], Microcode: tcb[7]}}
	if s.kind == attest.VCEK {
		out.template.HWID = s.report[0x1a0:0x1e0]
	} else {
		out.template.CSP = out.policy.CSPs[0]
	}
	return out
}

// turin is a report as a Turin processor makes it: nobody has published one.
func turin(t testing.TB) resigned {
	s := sampleNamed(t, "zen4c-v5")
	raw := with(s.report, 0x188, 0x1a, 0x02, 0x01)
	for _, at := range []int{0x38, 0x180, 0x1e0, 0x1f0} {
		copy(raw[at:], []byte{3, 1, 2, 4, 0, 0, 0, 77})
	}
	clear(raw[0x1a8:0x1e0])
	policy := production(snp.Turin)
	policy.Measurements, policy.HostData = one("image", raw[0x90:0xc0]), one("guest", raw[0xc0:0xe0])
	return resigned{
		authority: authority(t, snp.Turin), report: raw, policy: policy,
		template: snptest.Template{Kind: attest.VCEK, HWID: raw[0x1a0:0x1a8], TCB: attest.TCB{FMC: 3, Bootloader: 1, TEE: 2, SNP: 4, Microcode: 77}},
	}
}

// request signs the report, and asks about it with the certificate of that key.
func (r resigned) request(t testing.TB) snp.Request {
	t.Helper()
	key, err := r.authority.Issue(r.template)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := key.Sign(r.report)
	if err != nil {
		t.Fatal(err)
	}
	return snp.Request{
		Evidence: attest.Evidence{Kind: attest.KindSNP, Octets: raw}, Endorsements: attest.Endorsements{Certificates: [][]byte{key.DER}},
		ReportData: r.report[0x50:0x90], Policy: r.policy, At: spring,
	}
}

func (r resigned) appraise(t testing.TB) *attest.Verdict {
	t.Helper()
	return verifier(t, r.authority.Root()).Appraise(r.request(t))
}

// bump changes one part of a TCB by one, up and down.
func bumps(tcb attest.TCB, withFMC bool) []attest.TCB {
	var out []attest.TCB
	for _, part := range []func(*attest.TCB) *uint8{
		func(t *attest.TCB) *uint8 { return &t.Bootloader }, func(t *attest.TCB) *uint8 { return &t.TEE },
		func(t *attest.TCB) *uint8 { return &t.SNP }, func(t *attest.TCB) *uint8 { return &t.Microcode },
		func(t *attest.TCB) *uint8 { return &t.FMC },
	}[:map[bool]int{false: 4, true: 5}[withFMC]] {
		up, down := tcb, tcb
		*part(&up)++
		*part(&down)-- // of 0 this is 255
		out = append(out, up, down)
	}
	return out
}

// A certificate whose TCB differs by one in any part is refused; with the same TCB the report passes.
func TestCertificateTCBOffByOne(t *testing.T) {
	cases := map[string]resigned{"turin": turin(t)}
	for _, s := range allSamples(t) {
		cases[s.name] = resign(t, s)
	}
	count := 0
	for name, r := range cases {
		t.Run(name, func(t *testing.T) {
			var debug []string
			if name == "milan-v2-debug" {
				debug = []string{"guest-policy.debug"}
			}
			wantFailures(t, r.appraise(t), debug...)
			for _, tcb := range bumps(r.template.TCB, name == "turin") {
				r.template.TCB = tcb
				wantFailures(t, r.appraise(t), append([]string{"certificate-tcb"}, debug...)...)
				count++
			}
		})
	}
	t.Logf("%d certificates refused", count)
}

// A chain of AMD's shape that leads to another root is refused under AMD's roots, also if it brings its root along.
func TestForgedChain(t *testing.T) {
	for _, r := range []resigned{resign(t, sampleNamed(t, "zen4c-v5")), resign(t, sampleNamed(t, "milan-v3-vlek")), turin(t)} {
		request := r.request(t)
		for _, c := range append(r.authority.Root().Intermediates, r.authority.ARK) {
			request.Endorsements.Certificates = append(request.Endorsements.Certificates, c.Raw)
		}
		wantFailures(t, verifier(t).Appraise(request), "chain")
	}
}

// An ASK does not sign VLEKs, nor an ASVK VCEKs; and the report says which of them signed it.
func TestKindsOfKeys(t *testing.T) {
	s := sampleNamed(t, "zen4c-v5")
	r := resign(t, s)
	r.template.Kind, r.template.HWID, r.template.CSP = attest.VLEK, nil, "CN=test"
	wantFailures(t, r.appraise(t), "certificate")

	r = resign(t, s) // the report says VLEK, the key is a VCEK
	r.report = with(r.report, 0x48, 1<<2)
	if f := failing(r.appraise(t)); !slices.Contains(f, "certificate") {
		t.Errorf("failing %q", f)
	}
	r = resign(t, s) // signed by nobody
	r.report = with(r.report, 0x48, 7<<2)
	if f := failing(r.appraise(t)); !slices.Contains(f, "signing-key") || !slices.Contains(f, "certificate") {
		t.Errorf("failing %q", f)
	}
}

// What a certificate of a key may and must say.
func TestKeyCertificates(t *testing.T) {
	spl := func(n int) asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1, 3, n} }
	type change func(*snptest.Template)
	leave := func(n int) change {
		return func(t *snptest.Template) { t.Leave = append(t.Leave, spl(n)) }
	}
	add := func(n, value int) change {
		return func(t *snptest.Template) {
			t.Leave, t.More = append(t.Leave, spl(n)), append(t.More, snptest.Extension(spl(n), value))
		}
	}
	for name, c := range map[string]struct {
		turin  bool
		change change
		fails  string
	}{
		"no bootloader":        {false, leave(1), "certificate"},
		"no microcode":         {false, leave(8), "certificate"},
		"no reserved part":     {false, leave(4), ""},
		"reserved part not 0":  {false, add(5, 1), "certificate"},
		"FMC of Genoa":         {false, add(9, 0), "certificate"},
		"unknown part":         {false, add(10, 0), "certificate"},
		"part of 256":          {false, add(8, 256), "certificate"},
		"part of -1":           {false, add(8, -1), "certificate"},
		"no FMC of Turin":      {true, leave(9), "certificate"},
		"short hardware id":    {false, func(t *snptest.Template) { t.HWID = t.HWID[:8] }, "certificate"},
		"no hardware id":       {false, func(t *snptest.Template) { t.HWID = nil }, "certificate"},
		"long hardware id":     {true, func(t *snptest.Template) { t.HWID = append(t.HWID[:8:8], make([]byte, 56)...) }, "certificate"},
		"tagged hardware id":   {true, func(t *snptest.Template) { t.HWID, _ = asn1.Marshal(t.HWID) }, ""},
		"other hardware id":    {true, func(t *snptest.Template) { t.HWID = make([]byte, 8) }, "certificate-chip-id"},
		"hardware id and CSP":  {false, func(t *snptest.Template) { t.CSP = "CN=test" }, "certificate"},
		"other stepping":       {false, func(t *snptest.Template) { t.Product = "Genoa-B7" }, ""},
		"other product":        {false, func(t *snptest.Template) { t.Product = "Milan-B0" }, "certificate-product chain"},
		"unknown product":      {false, func(t *snptest.Template) { t.Product = "Rome" }, "certificate"},
		"not yet valid":        {false, func(t *snptest.Template) { t.From, t.Until = spring.AddDate(0, 0, 1), spring.AddDate(1, 0, 0) }, "certificate-validity"},
		"expired":              {false, func(t *snptest.Template) { t.From, t.Until = spring.AddDate(-1, 0, 0), spring.AddDate(0, 0, -1) }, "certificate-validity"},
		"expired before birth": {false, func(t *snptest.Template) { t.From, t.Until = spring.AddDate(-30, 0, 0), spring.AddDate(-20, 0, 0) }, "chain certificate-validity"},
		"critical extension": {false, func(t *snptest.Template) {
			t.More = append(t.More, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}})
		}, "chain"},
	} {
		t.Run(name, func(t *testing.T) {
			r := resign(t, sampleNamed(t, "zen4c-v5"))
			if c.turin {
				r = turin(t)
			}
			c.change(&r.template)
			if strings.Contains(c.fails, "certificate-product") {
				// The root of the other line is not there, so nobody issued it.
				c.fails = "certificate-product issuer"
			}
			wantFailures(t, r.appraise(t), strings.Fields(c.fails)...)
		})
	}
}

// Every truncation is refused, and so is every octet too many that is no table.
func TestLengths(t *testing.T) {
	v := verifier(t)
	s := sampleNamed(t, "zen4c-v5")
	r := s.request(t)
	for n := range s.report {
		r.Evidence.Octets = s.report[:n]
		wantFailures(t, v.Appraise(r), "report-size")
	}
	for n := 1; n <= 4096; n += 5 {
		r.Evidence.Octets = append(bytes.Clone(s.report), bytes.Repeat([]byte{7}, n)...)
		wantFailures(t, v.Appraise(r), "certificate-table")
	}
	r.Evidence.Octets = append(bytes.Clone(s.report), make([]byte, snp.MaxExtended-snp.ReportSize)...)
	wantFailures(t, v.Appraise(r)) // an empty table
	r.Evidence.Octets = append(r.Evidence.Octets, 0)
	wantFailures(t, v.Appraise(r), "report-size")
	r = s.request(t)
	r.Evidence.Kind = ""
	wantFailures(t, v.Appraise(r), "kind")
}

// Versions that are not known are refused, each by its number, also if the hardware signed them.
func TestVersions(t *testing.T) {
	for version := range uint32(300) {
		for _, n := range []uint32{version, version << 8, 1<<31 + version} {
			r := resign(t, sampleNamed(t, "zen4c-v5"))
			binary.LittleEndian.PutUint32(r.report, n)
			if known := n == 2 || n == 3 || n == 5; known || n%40 != 0 && n > 10 {
				continue
			}
			verdict := r.appraise(t)
			wantFailures(t, verdict, "report-version")
			if c := verdict.Failures()[0]; c.Got != fmt.Sprint(n) || c.Expected != "2, 3 or 5" {
				t.Errorf("%+v", c)
			}
		}
	}
}

// Processors that are not known are refused, and no other line's certificate or layout is used for one that is.
func TestProcessors(t *testing.T) {
	known := map[string][]string{}
	for family := range 256 {
		for model := range 256 {
			if l := snp.LineOf(uint8(family), uint8(model)); l != "" {
				known[l] = append(known[l], fmt.Sprintf("%02x/%02x", family, model))
			}
		}
	}
	if n := len(known["Milan"]); n != 16 || len(known["Genoa"]) != 32 || len(known["Turin"]) != 18 || len(known) != 3 {
		t.Errorf("%v", known)
	}
	for _, c := range []struct {
		family, model byte
		fails         []string
	}{
		{0x19, 0xa0, nil}, {0x19, 0x11, nil},
		{0x19, 0x01, []string{"certificate-product", "product"}},
		{0x1a, 0x02, []string{"tcb", "certificate-product", "certificate-tcb", "product"}},
		{0x00, 0x00, []string{"product", "product"}}, {0xff, 0xff, []string{"product", "product"}}, {0x1a, 0x50, []string{"product", "product"}},
	} {
		r := resign(t, sampleNamed(t, "zen4c-v5"))
		r.report = with(r.report, 0x188, c.family, c.model)
		wantFailures(t, r.appraise(t), c.fails...)
	}
}

// What the report's form forbids, though the hardware signed it.
func TestForm(t *testing.T) {
	for name, c := range map[string]struct {
		sample string
		at     int
		octets []byte
		fails  string
	}{
		"reserved octet":               {"zen4c-v5", 0x4c, []byte{1}, "report"},
		"reserved octet after CPUID":   {"zen4c-v5", 0x18b, []byte{1}, "report"},
		"CPUID in version 2":           {"milan-v2-a", 0x188, []byte{0x19, 1, 1}, "report"},
		"mitigations in version 3":     {"milan-v3-vlek", 0x1f8, []byte{1}, "report"},
		"unknown flag of guest policy": {"zen4c-v5", 0x0c, []byte{1}, "report"},
		"guest policy without bit 17":  {"zen4c-v5", 0x0a, []byte{1}, "report"},
		"unknown flag of platform":     {"zen4c-v5", 0x41, []byte{1}, "report"},
		"unknown signer":               {"zen4c-v5", 0x48, []byte{3 << 2}, "report"},
		"another algorithm":            {"zen4c-v5", 0x34, []byte{2}, "signature-algorithm signature"},
		"reserved octet of a TCB":      {"zen4c-v5", 0x1e4, []byte{1}, "tcb"},
		"reserved octet of REPORTED":   {"zen4c-v5", 0x182, []byte{1}, "tcb"},
		"the host's own report":        {"zen4c-v5", 0x30, []byte{0xff, 0xff, 0xff, 0xff}, "vmpl"},
	} {
		t.Run(name, func(t *testing.T) {
			r := resign(t, sampleNamed(t, c.sample))
			r.report = with(r.report, c.at, c.octets...)
			r.policy.VMPLs = []uint32{0, 1, 0xffffffff}
			wantFailures(t, r.appraise(t), strings.Fields(c.fails)...)
		})
	}
}

// Chip ids that are all zero need the policy's word; then the VCEK says which chip it is.
func TestMaskedChip(t *testing.T) {
	r := resign(t, sampleNamed(t, "zen4c-v5"))
	chip := bytes.Clone(r.report[0x1a0:0x1e0])
	r.report = with(r.report, 0x1a0, make([]byte, 64)...)
	wantFailures(t, r.appraise(t), "masked-chip-id")
	r.policy.AllowMaskedChip = true
	wantFailures(t, r.appraise(t))
	r.policy.DenyChips = one("chip", chip)
	wantFailures(t, r.appraise(t), "deny-chip-id")
	r.policy.DenyChips, r.policy.Chips = nil, one("chip", chip)
	wantFailures(t, r.appraise(t))
	r.policy.Chips = one("chip", make([]byte, 64))
	wantFailures(t, r.appraise(t), "chip-id")
}

// Under a zero time nothing is valid; without a policy or a session nothing passes.
func TestNothingIsLeftOut(t *testing.T) {
	v, s := verifier(t), sampleNamed(t, "zen4c-v5")
	r := s.request(t)
	r.At = time.Time{}
	if v.Appraise(r).Pass() {
		t.Error("passes at no time")
	}
	r = s.request(t)
	r.Policy = nil
	if verdict := v.Appraise(r); verdict.Pass() || verdict.Of(attest.Appraisal) != attest.Unchecked || len(failing(verdict)) > 0 {
		t.Errorf("without a policy: %q", failing(verdict))
	}
	r = s.request(t)
	r.ReportData = nil
	if verdict := v.Appraise(r); verdict.Pass() || verdict.Of(attest.Binding) != attest.Unchecked || len(failing(verdict)) > 0 {
		t.Errorf("without a session: %q", failing(verdict))
	}
	for _, wrong := range [][]byte{{}, s.report[0x50:0x8f], make([]byte, 64), append(bytes.Clone(s.report[0x50:0x90]), 0)} {
		r = s.request(t)
		r.ReportData = wrong
		wantFailures(t, v.Appraise(r), "report-data")
	}
	r = s.request(t)
	r.Endorsements = attest.Endorsements{}
	wantFailures(t, v.Appraise(r), "certificate")
	if v.Appraise(snp.Request{}).Pass() || v.AppraiseCertificates(attest.Endorsements{}, spring).Pass() {
		t.Error("nothing passes")
	}
}

// All failures are there at once.
func TestAllFailuresAtOnce(t *testing.T) {
	s := sampleNamed(t, "milan-v2-debug")
	r := s.request(t)
	r.Policy = production(snp.Genoa)
	r.Policy.VMPLs, r.Policy.MinGuestSVN = []uint32{1}, 3
	r.Policy.Guest = attest.GuestPolicy{ABIMajor: 1, RequireSingleSocket: true}
	r.ReportData = make([]byte, 64)
	r.At = r.At.AddDate(10, 0, 0)
	wantFailures(t, verifier(t).Appraise(r), "certificate-validity", "report-data", "product", "vmpl", "measurement", "guest-svn",
		"guest-policy.abi", "guest-policy.debug", "guest-policy.smt", "guest-policy.single-socket")
}
