package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"encoding/xml"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"

	"keybroker/attest"
	"keybroker/internal/policy"
)

// launchVectors are firmware and the digests that it must give.
const launchVectors = "../../../shared/vectors/snp-measure"

// launchCase is one expected digest.
type launchCase struct{ firmware, features, command, digest string }

func launchCases(t *testing.T) []launchCase {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(launchVectors, "cases.txt"))
	if err != nil {
		t.Fatalf("the vectors must be there: %v", err)
	}
	var out []launchCase
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if len(words) < 4 || words[0] == "#" {
			continue
		}
		command := strings.Join(words[2:len(words)-1], " ")
		out = append(out, launchCase{filepath.Join(launchVectors, words[0]), words[1], strings.TrimPrefix(command, "-"), words[len(words)-1]})
	}
	if len(out) < 4 {
		t.Fatalf("%d cases", len(out))
	}
	return out
}

// Every case, alone and as part of a range, as a table, as JSON, and as a policy that can be read.
func TestMeasure(t *testing.T) {
	empty := writeFile(t, "empty", nil)
	for _, c := range launchCases(t) {
		args := []string{"measure", "--firmware", c.firmware, "--kernel", empty, "--initrd", empty, "--append", c.command, "--vcpu-type", "EPYC-v4", "--guest-features", c.features}
		for _, vcpus := range []string{"1", "1-64"} {
			status, out, stderr := call(t, append(args, "--vcpus", vcpus)...)
			lines := strings.Split(strings.TrimSpace(out), "\n")
			if status != 0 || strings.Join(strings.Fields(lines[1]), " ") != "1 "+c.digest || vcpus == "1-64" && len(lines) != 65 {
				t.Errorf("%s: status %d\n%s%s", vcpus, status, out, stderr)
			}
		}
		_, out, _ := call(t, append(args, "--vcpus", "1-2", "--json")...)
		var m measurement
		if err := json.Unmarshal([]byte(out), &m, json.RejectUnknownMembers(true)); err != nil || m.Digests[0].Measurement != c.digest || len(m.Digests) != 2 {
			t.Errorf("%v: %s", err, out)
		}
		entries := append(args, "--vcpus", "1-2", "--policy-name", "web 1.2", "--until", "2027-01-31")
		_, out, _ = call(t, append(entries, "--standalone")...)
		rest := "signer = [\"VCEK\"]\nvmpl = [0]\ncrl = \"when-given\"\nsubject = \"11111111-2222-3333-4444-555555555555\"\n"
		product := "[[product]]\nline = \"Milan\"\ntcb = { bootloader = 1, tee = 0, snp = 1, microcode = 1 }\n"
		p, err := policy.ParseSNP("snp.toml", []byte(rest+out+product))
		if err != nil || len(p.Measurements) != 2 || hex.EncodeToString(p.Measurements[0].Value) != c.digest || p.Measurements[1].Name != "web 1.2, vcpus 2" || p.Measurements[0].Until.IsZero() {
			t.Errorf("%v\n%s", err, out)
		}
		_, inPolicy, _ := call(t, entries...)
		if inPolicy != strings.ReplaceAll(out, "[[measurement]]", "[[snp.measurement]]") || inPolicy == out {
			t.Errorf("for policy.toml:\n%s", inPolicy)
		}
		table := "[[snp]]\nname = \"web\"\n" + strings.Replace(rest, "subject", "#", 1) + inPolicy + strings.Replace(product, "[[", "[[snp.", 1)
		if _, err := policy.Parse(policy.File{Name: "policy.toml", Text: []byte(table)}); err != nil {
			t.Errorf("%v\n%s", err, table)
		}
		if !strings.Contains(out, `# kernel    "empty", SHA-256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855`) {
			t.Errorf("the policy does not say what it was made from:\n%s", out)
		}
	}
}

func TestMeasureMistakes(t *testing.T) {
	firmware := filepath.Join(launchVectors, "ovmf_AmdSev_suffix.bin")
	for name, c := range map[string]struct {
		status int
		args   string
	}{
		"no processors":       {2, "--firmware F --vcpu-type EPYC"},
		"range backwards":     {2, "--firmware F --vcpu-type EPYC --vcpus 2-1"},
		"too many":            {2, "--firmware F --vcpu-type EPYC --vcpus 4097"},
		"unknown type":        {2, "--firmware F --vcpu-type host --vcpus 1"},
		"bad signature":       {2, "--firmware F --vcpu-type 0xzz --vcpus 1"},
		"bad features":        {2, "--firmware F --vcpu-type EPYC --vcpus 1 --guest-features x"},
		"initrd, no kernel":   {2, "--firmware F --vcpu-type EPYC --vcpus 1 --initrd F"},
		"append, no kernel":   {2, "--firmware F --vcpu-type EPYC --vcpus 1 --append x"},
		"until, no policy":    {2, "--firmware F --vcpu-type EPYC --vcpus 1 --until 2027-01-01"},
		"alone, no policy":    {2, "--firmware F --vcpu-type EPYC --vcpus 1 --standalone"},
		"bad until":           {2, "--firmware F --vcpu-type EPYC --vcpus 1 --policy-name a --until x"},
		"bad policy name":     {2, "--firmware F --vcpu-type EPYC --vcpus 1 --policy-name a\"b"},
		"features without 1":  {1, "--firmware F --vcpu-type EPYC --vcpus 1 --guest-features 0x2"},
		"no firmware there":   {1, "--firmware nowhere --vcpu-type EPYC --vcpus 1"},
		"no firmware at all":  {1, "--firmware /dev/null --vcpu-type EPYC --vcpus 1"},
		"no kernel there":     {1, "--firmware F --vcpu-type EPYC --vcpus 1 --kernel nowhere"},
		"no initrd there":     {1, "--firmware F --vcpu-type EPYC --vcpus 1 --kernel F --initrd nowhere"},
		"a signature is fine": {0, "--firmware F --vcpu-type 0x800f12 --vcpus 1"},
	} {
		args := []string{"measure"}
		for word := range strings.FieldsSeq(c.args) {
			if word == "F" {
				word = firmware
			}
			args = append(args, word)
		}
		status, out, stderr := call(t, args...)
		if status != c.status || (out == "") != (status != 0) || status != 0 && strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: status %d\n%s%s", name, status, out, stderr)
		}
	}
}

// newPEMKey writes a key on a curve to a file.
func newPEMKey(t *testing.T, curve elliptic.Curve) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return writeFile(t, "key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// launchSecurity is libvirt's element, as far as idblock writes it.
type launchSecurity struct {
	Type         string `xml:"type,attr"`
	KernelHashes string `xml:"kernelHashes,attr"`
	AuthorKey    string `xml:"authorKey,attr"`
	Policy       string `xml:"policy"`
	IDBlock      string `xml:"idBlock"`
	IDAuth       string `xml:"idAuth"`
	HostData     string `xml:"hostData"`
}

func TestIDBlockCommand(t *testing.T) {
	dir := t.TempDir()
	blockFile, authFile := filepath.Join(dir, "block"), filepath.Join(dir, "auth")
	args := []string{"idblock", "--measurement", strings.Repeat("0a", 48), "--id-key", newPEMKey(t, elliptic.P384()), "--author-key", newPEMKey(t, elliptic.P384()),
		"--subject", "11111111-2222-3333-4444-555555555555", "--kernel-hashes", "--family-id", strings.Repeat("0b", 16), "--image-id", strings.Repeat("0c", 16), "--guest-svn", "7"}
	status, out, stderr := call(t, append(args, "--out-block", blockFile, "--out-auth", authFile)...)
	if status != 0 || stderr != "" {
		t.Fatalf("status %d: %s", status, stderr)
	}
	var e launchSecurity
	if err := xml.Unmarshal([]byte(out), &e); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if e.Type != "sev-snp" || e.KernelHashes != "yes" || e.AuthorKey != "yes" || e.Policy != "0x30000" {
		t.Errorf("%+v", e)
	}
	if e.HostData != base64.StdEncoding.EncodeToString(attest.HostData("11111111-2222-3333-4444-555555555555")) {
		t.Errorf("HOST_DATA %s", e.HostData)
	}
	for name, c := range map[string]struct {
		text string
		size int
	}{blockFile: {e.IDBlock, 96}, authFile: {e.IDAuth, 4096}} {
		octets, err := os.ReadFile(name)
		if err != nil || len(octets) != c.size || base64.StdEncoding.EncodeToString(octets) != c.text {
			t.Errorf("%s has %d octets, %v", name, len(octets), err)
		}
	}
	want := strings.Repeat("0a", 48) + strings.Repeat("0b", 16) + strings.Repeat("0c", 16) + "01000000" + "07000000" + "0000030000000000"
	if octets, _ := os.ReadFile(blockFile); fmt.Sprintf("%x", octets) != want {
		t.Errorf("block %x", octets)
	}
	if status, _, _ := call(t, append(args, "--out-block", blockFile)...); status != exitFailure {
		t.Errorf("a file that is there: status %d", status)
	}
	_, out, _ = call(t, append(args, "--json")...)
	var s signedBlock
	if err := json.Unmarshal([]byte(out), &s, json.RejectUnknownMembers(true)); err != nil || len(s.Block) != 96 || len(s.Auth) != 4096 || len(s.IDKeyDigest) != 96 || len(s.AuthorKeyDigest) != 96 || len(s.HostData) != 64 {
		t.Errorf("%v: %s", err, out)
	}
}

func TestIDBlockMistakes(t *testing.T) {
	key := newPEMKey(t, elliptic.P384())
	digits := strings.Repeat("00", 48)
	for name, c := range map[string]struct {
		status int
		args   []string
	}{
		"no measurement":    {2, []string{"--id-key", key}},
		"empty measurement": {2, []string{"--id-key", key, "--measurement", ""}},
		"short measurement": {2, []string{"--id-key", key, "--measurement", "00"}},
		"no key":            {2, []string{"--measurement", digits}},
		"short image id":    {2, []string{"--measurement", digits, "--id-key", key, "--image-id", "00"}},
		"no bit 17":         {2, []string{"--measurement", digits, "--id-key", key, "--guest-policy", "0x10000"}},
		"bad subject":       {2, []string{"--measurement", digits, "--id-key", key, "--subject", "web1"}},
		"short HOST_DATA":   {2, []string{"--measurement", digits, "--id-key", key, "--host-data", "00"}},
		"no key there":      {1, []string{"--measurement", digits, "--id-key", "nowhere"}},
		"a key on P-256":    {1, []string{"--measurement", digits, "--id-key", newPEMKey(t, elliptic.P256())}},
		"author on P-256":   {1, []string{"--measurement", digits, "--id-key", key, "--author-key", newPEMKey(t, elliptic.P256())}},
	} {
		status, out, stderr := call(t, append([]string{"idblock"}, c.args...)...)
		if status != c.status || out != "" || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: status %d\n%s%s", name, status, out, stderr)
		}
	}
	status, out, stderr := call(t, "idblock", "--measurement", digits, "--id-key", key, "--guest-policy", "0xf0000", "--host-data", strings.Repeat("00", 32))
	if status != 0 || strings.Count(stderr, "keybroker: warning: ") != 2 || strings.Contains(out, "authorKey") || !strings.Contains(out, "<hostData>AAAA") {
		t.Errorf("status %d\n%s%s", status, out, stderr)
	}
}
