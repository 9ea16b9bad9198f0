package derive

import (
	"bytes"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"

	"keybroker/internal/need"
	"keybroker/internal/tuple"
)

// See RFC 5869, appendix A: the cases with SHA-256.
func TestRFC5869(t *testing.T) {
	for _, c := range []struct{ name, ikm, prk, info, okm string }{
		{"A.1", "",
			"077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5", "f0f1f2f3f4f5f6f7f8f9",
			"3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"},
		{"A.2", "",
			"06a6b88c5853361a06104c9ceb35b45cef760014904671014a193f40c15fc244",
			"b0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeef" +
				"f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff",
			"b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71" +
				"cc30c58179ec3e87c14c01d5c1f3434f1d87"},
		{"A.3", "0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b",
			"19ef24a32c717b167f33a91d6f648bdf96596776afdb6377ac434c1c293ccb04", "",
			"8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"},
	} {
		prk := unhex(t, c.prk)
		if c.ikm != "" {
			got, err := extract(unhex(t, c.ikm))
			if err != nil {
				t.Fatal(err)
			}
			wantOctets(t, c.name+" PRK", got, prk)
		}
		okm, err := expand(prk, unhex(t, c.info), len(c.okm)/2)
		if err != nil {
			t.Fatal(err)
		}
		wantOctets(t, c.name+" OKM", okm, unhex(t, c.okm))
	}
}

type wycheproofCase struct {
	ID     int    `json:"tcId"`
	IKM    string `json:"ikm"`
	Salt   string `json:"salt"`
	Info   string `json:"info"`
	Size   int    `json:"size"`
	OKM    string `json:"okm"`
	Result string `json:"result"`
}

func wycheproofCases(t *testing.T) []wycheproofCase {
	t.Helper()
	b, err := os.ReadFile("../../shared/vectors/crypto/wycheproof-hkdf-sha256.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Tests  int `json:"numberOfTests"`
		Groups []struct {
			Tests []wycheproofCase `json:"tests"`
		} `json:"testGroups"`
	}
	if err := json.Unmarshal(b, &file); err != nil {
		t.Fatal(err)
	}
	var all []wycheproofCase
	for _, g := range file.Groups {
		all = append(all, g.Tests...)
	}
	if len(all) == 0 || len(all) != file.Tests {
		t.Fatalf("found %d of %d cases", len(all), file.Tests)
	}
	return all
}

func TestWycheproof(t *testing.T) {
	for _, c := range wycheproofCases(t) {
		prk, err := extract(unhex(t, c.IKM))
		if c.Salt != "" {
			prk, err = hkdf.Extract(sha256.New, unhex(t, c.IKM), unhex(t, c.Salt))
		}
		if err != nil {
			t.Fatal(err)
		}
		okm, err := expand(prk, unhex(t, c.Info), c.Size)
		if valid := c.Result == "valid"; valid != (err == nil) {
			t.Errorf("case %d: %v, want %s", c.ID, err, c.Result)
		} else if valid {
			wantOctets(t, fmt.Sprint("case ", c.ID), okm, unhex(t, c.OKM))
		}
	}
}

const goldenMaster = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"

func goldenSchedule(t testing.TB) *Schedule {
	t.Helper()
	m, err := NewMaster(unhex(t, goldenMaster))
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSchedule(m)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// vector is one derivation: of a service key if vm.Tier is empty.
type vector struct {
	name   string
	epoch  uint32
	length int
	vm     VMKeyID
}

func (v vector) info(t testing.TB) []byte {
	t.Helper()
	b, err := ServiceInfo(v.name, v.epoch, v.length)
	if v.vm.Tier != "" {
		b, err = VMInfo(v.vm.Tier, v.vm.Subject, v.vm.Name, v.vm.Epoch, v.vm.Length)
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (v vector) size() int { return max(v.length, v.vm.Length) }

func (v vector) derive(t testing.TB, s *Schedule) []byte {
	t.Helper()
	if v.vm.Tier != "" {
		k, err := s.VMKey(v.vm)
		if err != nil {
			t.Fatal(err)
		}
		return octetsOf(t, k)
	}
	k, err := s.ServiceKey(v.name, v.epoch, v.length)
	if err != nil {
		t.Fatal(err)
	}
	return octetsOf(t, k)
}

func service(name string, epoch uint32, length int) vector {
	return vector{name: name, epoch: epoch, length: length}
}

func vm(tier, name string, epoch uint32, length int) vector {
	return vector{vm: VMKeyID{Tier: tier, Subject: testSubject, Name: name, Epoch: epoch, Length: length}}
}

// DO NOT CHANGE: keys of the golden master, computed by other implementations (a few lines of Python's hmac, and OpenSSL
// for the identity). If one of these differs, every key in the field has changed.
var goldenKeys = []struct {
	vector
	key string
}{
	{service("my-database", 1, 32), "9cff4376de2b05d5192bb677c7d3e603ef4789f58e9d9638a685fc5326d713c7"},
	{service("my-database", 1, 64), "9cff4376de2b05d5192bb677c7d3e603ef4789f58e9d9638a685fc5326d713c7" +
		"e23f6c3c7259b04d626b07539ebc4f4f665899693d98c1c75200463991199c7c"},
	{service("my-database", 2, 32), "60af4fca346e082ecaa36f44dc1012f1da15b1df3537f7b723c0315c2587197c"},
	{vm(TierVM, "disk", 1, 64), "78b6968cd3af33f9e5d1309f3a2cab1704a8ddc291a6787105bf342297096b72" +
		"fa60a83e452916a280d68b8a6444cb3c78165b5d91bc23d1f874cf52ff5fed3c"},
	{vm(TierSNP, "disk", 258, 32), "1436af15360531d28add81036c1d3cc9e89a4b392e5bd49b17bb2598e9216e13"},
}

const (
	goldenRealmID  = "f22825548d9f1a196e351ef06a681ba1"
	goldenIdentity = "34da7cfd49547dc4e811e4204c261d4ca7be788c361bc96899a7242e3ca7067b"
	// Over E("keybroker/v1 release", "T", "", "ct").
	goldenSignature = "6e017c6c4a0687c98e4d30bf4205ecd3c76f845097e8f57f9c3eebede052ad9f" +
		"47f51583ab9a71d8ca8ca8ffbfd65192289238a6fdeea9e677a5a96837792903"
)

func TestGoldenKeys(t *testing.T) {
	s := goldenSchedule(t)
	for _, g := range goldenKeys {
		wantOctets(t, fmt.Sprintf("%+v", g.vector), g.derive(t, s), unhex(t, g.key))
	}
	if got := s.RealmID().String(); got != goldenRealmID {
		t.Errorf("realm id %s, want %s", got, goldenRealmID)
	}
	wantOctets(t, "identity", s.Identity(), unhex(t, goldenIdentity))
	signature, err := s.Sign(LabelRelease, []byte("T"), nil, []byte("ct"))
	if err != nil {
		t.Fatal(err)
	}
	wantOctets(t, "signature", signature, unhex(t, goldenSignature))
}

// Vectors beside the golden ones, for comparing implementations with each other.
func allVectors() []vector {
	var all []vector
	for _, g := range goldenKeys {
		all = append(all, g.vector)
	}
	for _, name := range []string{"a", "0", "db-1.example", strings.Repeat("z", 63)} {
		for _, epoch := range []uint32{1, 2, 3, 1<<32 - 1} {
			for _, length := range []int{32, 64} {
				all = append(all, service(name, epoch, length), vm(TierVM, name, epoch, length), vm(TierSNP, name, epoch, length))
			}
		}
	}
	return all
}

// No two names, epochs, tiers or structured lengths share a key.
func TestKeysDiffer(t *testing.T) {
	s := goldenSchedule(t)
	seen := map[string]vector{}
	for _, v := range allVectors() {
		start := string(v.derive(t, s)[:32])
		other, found := seen[start]
		if found && v != other && !(v.vm.Tier == "" && v.epoch == 1 && other.name == v.name) {
			t.Errorf("%+v and %+v have the same key", v, other)
		}
		seen[start] = v
	}
}

func TestEqualsOpenSSL(t *testing.T) {
	need.Program(t, "openssl")
	s := goldenSchedule(t)
	for _, v := range allVectors() {
		opt := "hexinfo:" + hex.EncodeToString(v.info(t))
		if v.info(t)[0] != 0 {
			opt = "info:" + v.name
		}
		wantOctets(t, fmt.Sprintf("%+v", v), v.derive(t, s), opensslHKDF(t, opt, v.size()))
	}
	id := s.RealmID()
	wantOctets(t, "realm id", id[:], opensslHKDF(t, "hexinfo:"+hex.EncodeToString(RealmIDInfo()), RealmIDSize))
	seed := opensslHKDF(t, "hexinfo:"+hex.EncodeToString(IdentityInfo(1)), ed25519.SeedSize)
	wantOctets(t, "identity", s.Identity(), ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey))
}

func opensslHKDF(t *testing.T, opt string, length int) []byte {
	t.Helper()
	cmd := exec.Command("openssl", "kdf", "-keylen", fmt.Sprint(length), "-kdfopt", "digest:SHA256",
		"-kdfopt", "hexkey:"+goldenMaster, "-kdfopt", opt, "HKDF")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, out)
	}
	return unhex(t, strings.ReplaceAll(strings.TrimSpace(string(out)), ":", ""))
}

func TestSign(t *testing.T) {
	s := testSchedule(t, 0)
	for _, label := range []string{LabelRelease, LabelAudit} {
		fields := [][]byte{[]byte("x"), nil, bytes.Repeat([]byte{7}, 1000)}
		signature, err := s.Sign(label, fields...)
		if err != nil {
			t.Fatal(err)
		}
		signed := append(tuple.Encode([]byte(label)), tuple.Encode(fields...)...)
		if !ed25519.Verify(s.Identity(), signed, signature) {
			t.Errorf("%s: the signature does not verify", label)
		}
	}
	// What is too long or under another label is refused.
	if _, err := s.Sign(LabelRelease, make([]byte, maxMessage-4)); err != nil {
		t.Errorf("the longest message: %v", err)
	}
	for what, err := range map[string]error{
		"no label":      second(s.Sign("", []byte("x"))),
		"session label": second(s.Sign("keybroker/v1 session", []byte("x"))),
		"longer label":  second(s.Sign(LabelRelease+" ", []byte("x"))),
		"too long":      second(s.Sign(LabelRelease, make([]byte, maxMessage-3))),
		"many fields":   second(s.Sign(LabelRelease, make([][]byte, maxFields+1)...)),
	} {
		if !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestScheduleWipe(t *testing.T) {
	s := testSchedule(t, 0)
	s.Wipe()
	if _, err := s.ServiceKey("a", 1, 32); !errors.Is(err, ErrNoKey) {
		t.Errorf("a service key of a wiped schedule: %v", err)
	}
	if _, err := s.Sign(LabelAudit); !errors.Is(err, ErrNoKey) {
		t.Errorf("a signature of a wiped schedule: %v", err)
	}
}

// What a caller does to a returned identity does not change the schedule's.
func TestIdentityIsACopy(t *testing.T) {
	s := testSchedule(t, 0)
	clear(s.Identity())
	if isZero(s.Identity()) {
		t.Error("the identity was changed from outside")
	}
}

func TestRealmID(t *testing.T) {
	if id := goldenSchedule(t).RealmID(); id.String() != goldenRealmID {
		t.Errorf("%s, want %s", id, goldenRealmID)
	}
}
