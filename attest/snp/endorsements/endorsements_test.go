package endorsements_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/endorsements"
	"keybroker/attest/snp/snptest"
)

// vectors is where the reports of real processors are; see the README there.
const vectors = "../../../../shared/vectors/snp"

func vector(t testing.TB, name string) []byte {
	t.Helper()
	octets, err := os.ReadFile(filepath.Join(vectors, name))
	if err != nil {
		t.Fatalf("the samples must be there: %v", err)
	}
	return octets
}

// parsed reads certificates of a vector in any form.
func parsed(t testing.TB, names ...string) attest.Endorsements {
	t.Helper()
	var out attest.Endorsements
	for _, name := range names {
		e, err := snp.ParseFile(vector(t, name))
		if err != nil {
			t.Fatal(err)
		}
		out.Certificates = append(out.Certificates, e.Certificates...)
	}
	return out
}

// open returns a store with a folder; without roots it trusts AMD's.
func open(t testing.TB, dir string, roots ...snp.Root) *endorsements.Store {
	t.Helper()
	if len(roots) == 0 {
		roots = snp.AMDRoots()
	}
	v, err := snp.New(snp.Config{Roots: roots})
	if err != nil {
		t.Fatal(err)
	}
	s, err := endorsements.New(endorsements.Config{Dir: dir, Verifier: v})
	if err != nil {
		t.Fatal(err)
	}
	if err := endorsements.Make(dir); err != nil {
		t.Fatal(err)
	}
	return s
}

func folderOf(t testing.TB) string { return filepath.Join(t.TempDir(), "endorsements") }

var authority = sync.OnceValues(func() (*snptest.Authority, error) { return snptest.New(snp.Milan) })

// testAuthority returns a test authority for Milan, and a store that trusts it.
func testAuthority(t testing.TB) (*snptest.Authority, *endorsements.Store) {
	t.Helper()
	a, err := authority()
	if err != nil {
		t.Fatal(err)
	}
	root := a.Root()
	root.Intermediates = root.Intermediates[:1] // as with AMD's: the ASVK is not known
	return a, open(t, folderOf(t), root)
}

func put(t testing.TB, s *endorsements.Store, e attest.Endorsements) []endorsements.Stored {
	t.Helper()
	stored, err := s.Put(t.Context(), e, nil)
	if err != nil {
		t.Fatal(err)
	}
	return stored
}

// list returns the names of what is stored, and of what is altered.
func list(t testing.TB, s *endorsements.Store) (good, bad []string) {
	t.Helper()
	entries, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Err != nil {
			bad = append(bad, e.File)
		} else {
			good = append(good, e.File)
		}
	}
	return good, bad
}

var everything = []string{
	"milan-v2-a.vcek.der", "milan-v2-b.vcek.der", "milan-v2-debug.vcek.der", "milan-v3-vlek.vlek.der", "zen4c-v5.vcek.der", "turin.vcek.der",
	"milan.ask-ark-asvk.pem", "genoa.ask-ark-asvk.pem", "turin.ask-ark-asvk.pem",
}

// All samples can be stored, and each report finds what verifies it: chain and signature hold with what the store has alone.
func TestSamples(t *testing.T) {
	dir := folderOf(t)
	put(t, open(t, dir), parsed(t, everything...))
	s := open(t, dir)
	if good, bad := list(t, s); len(good) != 15 || len(bad) != 0 ||
		!slices.ContainsFunc(good, func(n string) bool { return strings.HasPrefix(n, "vcek/Turin-") && len(strings.Split(n, "-")) == 7 }) {
		t.Errorf("%q, altered: %q", good, bad)
	}
	v, err := snp.New(snp.Config{Roots: snp.AMDRoots()})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"milan-v2-a", "milan-v2-b", "milan-v2-debug", "milan-v3-vlek", "zen4c-v5"} {
		report := vector(t, name+".report.bin")
		keys, err := snp.KeysOf(report)
		if err != nil {
			t.Fatal(err)
		}
		found, problems := s.Find(keys...)
		verdict := v.Appraise(snp.Request{Evidence: attest.Evidence{Kind: attest.KindSNP, Octets: report}, Endorsements: found})
		if len(problems) > 0 || !verdict.All([]attest.Part{attest.Form, attest.Signature, attest.Chain, attest.Revocation}) {
			t.Errorf("%s: %v, %+v", name, problems, verdict.Failures())
		}
		if _, err := s.Get(keys[0]); (err == nil) != (keys[0].Kind == attest.VCEK) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, o := range put(t, s, parsed(t, everything...)) {
		if o.New {
			t.Errorf("%s was written again", o.File)
		}
	}
}

// An altered file is found and never used; putting the endorsement again repairs it. The same goes for a good one under another
// name, and for what is no file.
func TestAlteredFiles(t *testing.T) {
	s := open(t, folderOf(t))
	put(t, s, parsed(t, everything...))
	report := vector(t, "zen4c-v5.report.bin")
	keys, err := snp.KeysOf(report)
	if err != nil {
		t.Fatal(err)
	}
	key, err := s.Get(keys[0])
	if err != nil {
		t.Fatal(err)
	}
	good, _ := list(t, s)
	names := slices.DeleteFunc(slices.Clone(good), func(n string) bool { return !strings.HasPrefix(n, "vcek/") })
	mine := names[slices.IndexFunc(names, func(n string) bool { return strings.HasPrefix(n, "vcek/Genoa") })]
	other := names[slices.IndexFunc(names, func(n string) bool { return strings.HasPrefix(n, "vcek/Milan") })]
	path := filepath.Join(s.Dir(), mine)
	for what, alter := range map[string]func() error{
		"a bit":      func() error { return os.WriteFile(path, append([]byte{key.DER[0] ^ 1}, key.DER[1:]...), 0o600) },
		"signature":  func() error { return os.WriteFile(path, append(key.DER[:len(key.DER)-1:len(key.DER)-1], 1), 0o600) },
		"cut":        func() error { return os.Truncate(path, 700) },
		"empty":      func() error { return os.Truncate(path, 0) },
		"huge":       func() error { return os.Truncate(path, 1<<40) },
		"another's":  func() error { return copyFile(filepath.Join(s.Dir(), other), path) },
		"a folder":   func() error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
		"a link out": func() error { return errors.Join(os.Remove(path), os.Symlink("/dev/zero", path)) },
	} {
		if err := alter(); err != nil {
			t.Fatal(err)
		}
		_, bad := list(t, s)
		found, problems := s.Find(keys...)
		if !slices.Equal(bad, []string{mine}) || len(problems) != 1 || !strings.Contains(problems[0].Error(), mine) ||
			slices.ContainsFunc(found.Certificates, func(der []byte) bool { k, err := snp.KeyOf(der); return err == nil && k.Chip != nil }) {
			t.Errorf("%s: altered %q, %v, %d found", what, bad, problems, len(found.Certificates))
		}
		if what == "a folder" {
			os.Remove(path)
		}
		if stored := put(t, s, parsed(t, "zen4c-v5.vcek.der")); len(stored) != 1 || !stored[0].New {
			t.Errorf("%s: not repaired: %+v", what, stored)
		}
		if _, bad := list(t, s); len(bad) != 0 {
			t.Errorf("%s: still altered: %q", what, bad)
		}
	}
	if err := os.WriteFile(filepath.Join(s.Dir(), "notes.txt"), []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, bad := list(t, s); !slices.Equal(bad, []string{"notes.txt"}) {
		t.Errorf("%q", bad)
	}
}

func copyFile(from, to string) error {
	octets, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, octets, 0o600)
}

// What does not verify, or is not wanted, is refused together with all that came with it.
func TestNothingOfWhatIsRefusedIsStored(t *testing.T) {
	forger, err := authority()
	if err != nil {
		t.Fatal(err)
	}
	forged, err := forger.Issue(snptest.Template{Kind: attest.VCEK, HWID: make([]byte, 64)})
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, folderOf(t))
	given := parsed(t, "zen4c-v5.vcek.der", "milan.ask-ark-asvk.pem")
	for what, e := range map[string]attest.Endorsements{
		"forged": {Certificates: append(slices.Clone(given.Certificates), forged.DER, forger.ASK.Raw, forger.ARK.Raw)},
		"a list": {Certificates: given.Certificates, CRLs: given.Certificates[:1:1]},
		"vlek":   parsed(t, "zen4c-v5.vcek.der", "milan-v3-vlek.vlek.der"),
		"":       given,
	} {
		wanted := func([]*snp.Endorsement) error { return nil }
		if what == "" {
			wanted = func(list []*snp.Endorsement) error { return errors.New("too many") }
		}
		if what == "a list" {
			e.CRLs = [][]byte{[]byte("none")}
		}
		stored, err := s.Put(t.Context(), e, wanted)
		if good, bad := list(t, s); !errors.Is(err, endorsements.ErrRefused) || stored != nil || len(good)+len(bad) > 0 {
			t.Errorf("%s: %v, stored %q", what, err, good)
		}
	}
}

// Of two for the same key the one that lasts longer stays, in whatever order they come.
func TestTheBetterStays(t *testing.T) {
	a, s := testAuthority(t)
	var keys []attest.Endorsements
	for _, years := range []int{7, 6, 8} {
		from := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		k, err := a.Issue(snptest.Template{Kind: attest.VCEK, HWID: bytes.Repeat([]byte{7}, 64), From: from, Until: from.AddDate(years, 0, 0)})
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, attest.Endorsements{Certificates: [][]byte{k.DER}})
	}
	for i, want := range []bool{true, false, true} {
		if stored := put(t, s, keys[i]); stored[0].New != want {
			t.Errorf("number %d: %+v", i, stored[0])
		}
	}
	if good, _ := list(t, s); len(good) != 1 {
		t.Errorf("%q", good)
	}
}

// A newer revocation list takes the place of the older ones, unless something would then not be revoked any more.
func TestRevocationLists(t *testing.T) {
	a, s := testAuthority(t)
	crl := func(month time.Month, serials ...int64) {
		t.Helper()
		der, err := a.CRL(time.Date(2026, month, 1, 0, 0, 0, 0, time.UTC), time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC), serials...)
		if err != nil {
			t.Fatal(err)
		}
		put(t, s, attest.Endorsements{CRLs: [][]byte{der}})
	}
	want := func(n int) {
		t.Helper()
		found, problems := s.Find(snp.Key{Kind: attest.VCEK, Line: snp.Milan})
		if good, bad := list(t, s); len(good) != n || len(bad) > 0 || len(found.CRLs) != n || problems != nil {
			t.Errorf("expected %d lists: %q, %q, %d found, %v", n, good, bad, len(found.CRLs), problems)
		}
	}
	crl(3)
	crl(1)
	want(1)
	crl(4, 2)
	want(1)
	crl(5, 3) // that of VLEKs' issuers, which is another one
	want(2)
	crl(2, 2)
	want(2)
	crl(6, 2, 3)
	want(1)
	if found, _ := s.Find(snp.Key{Kind: attest.VCEK, Line: snp.Genoa}); len(found.CRLs) > 0 {
		t.Error("another line gets it")
	}
}

// evidence is a report with a table of certificates behind it.
func evidence(report []byte, guids []string, blobs [][]byte) attest.Evidence {
	head := make([]byte, 24*(len(blobs)+1))
	var body []byte
	for i, b := range blobs {
		copy(head[24*i:], guids[i])
		at := len(head) + len(body)
		copy(head[24*i+16:], []byte{byte(at), byte(at >> 8), byte(at >> 16), 0, byte(len(b)), byte(len(b) >> 8), 0, 0})
		body = append(body, b...)
	}
	return attest.Evidence{Kind: attest.KindSNP, Octets: slices.Concat(report, head, body)}
}

const vcekGUID, askGUID = "\x63\xda\x75\x8d\xe6\x64\x45\x64\xad\xc5\xf4\xb9\x3b\xe8\xac\xcd", "\x4a\xb7\xb3\x79\xbb\xac\x4f\xe4\xa0\x2f\x05\xae\xf3\x27\xc7\x82"

// Of what a guest sends along only that is kept which its own report needs.
func TestPutEvidence(t *testing.T) {
	s := open(t, folderOf(t))
	report := vector(t, "zen4c-v5.report.bin")
	guids := []string{vcekGUID, vcekGUID, vcekGUID, askGUID}
	blobs := [][]byte{vector(t, "zen4c-v5.vcek.der"), vector(t, "milan-v2-a.vcek.der"), vector(t, "turin.vcek.der"), vector(t, "genoa.ask-ark-asvk.pem")}
	stored, err := s.PutEvidence(t.Context(), evidence(report, guids, blobs))
	if err != nil {
		t.Fatal(err)
	}
	good, _ := list(t, s)
	if len(stored) != 3 || len(good) != 3 || !strings.HasPrefix(good[0], "ark-Genoa-") || !strings.HasPrefix(good[1], "ask-Genoa-") || !strings.HasPrefix(good[2], "vcek/Genoa-") {
		t.Errorf("%q, %+v", good, stored)
	}
	for what, ev := range map[string]attest.Evidence{
		"nothing": {}, "short": {Octets: report[:700]}, "a bad table": {Octets: append(bytes.Clone(report), 1)}, "too much": {Octets: make([]byte, snp.MaxExtended+1)},
	} {
		if _, err := s.PutEvidence(t.Context(), ev); err == nil {
			t.Errorf("%s: no error", what)
		}
	}
	if stored, err := s.PutEvidence(t.Context(), attest.Evidence{Octets: report}); err != nil || len(stored) > 0 {
		t.Errorf("a report alone: %v, %+v", err, stored)
	}
}

// What a killed process leaves behind is no endorsement, and goes with the next one that writes.
func TestLeftovers(t *testing.T) {
	s := open(t, folderOf(t))
	left := filepath.Join(s.Dir(), ".store-0011223344556677.tmp")
	others := filepath.Join(s.Dir(), ".keyservice-0011223344556677.tmp") // another lock's: its writer may be alive
	for _, name := range []string{left, others} {
		if err := os.WriteFile(name, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if good, bad := list(t, s); len(good)+len(bad) > 0 {
		t.Errorf("%q, %q", good, bad)
	}
	put(t, s, parsed(t, "genoa.ask-ark-asvk.pem"))
	if _, err := os.Stat(left); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
	if _, err := os.Stat(others); err != nil {
		t.Error(err)
	}
}

// A folder that is not there: reading says so, and nothing is made behind the administrator's back.
func TestNoFolder(t *testing.T) {
	s := open(t, folderOf(t))
	if err := os.Remove(s.Dir()); err != nil {
		t.Fatal(err)
	}
	_, listErr := s.List()
	_, putErr := s.Put(t.Context(), parsed(t, "turin.vcek.der"), nil)
	_, problems := s.Find(snp.Key{Kind: attest.VCEK, Line: snp.Turin})
	for _, err := range []error{listErr, putErr, errors.Join(problems...)} {
		if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v", err)
		}
	}
	if _, err := os.Stat(s.Dir()); err == nil {
		t.Error("it was made")
	}
}

// Many put and find at once, through several stores of one folder, as many processes would: everything is there in the end, and
// nobody ever sees half of it.
func TestAtOnce(t *testing.T) {
	dir := folderOf(t)
	all := parsed(t, everything...)
	report := vector(t, "zen4c-v5.report.bin")
	keys, err := snp.KeysOf(report)
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for range 4 {
		s := open(t, dir)
		for range 2 {
			group.Go(func() {
				for i := range all.Certificates {
					e := attest.Endorsements{Certificates: all.Certificates[i:]}
					if _, err := s.Put(context.Background(), e, nil); err != nil && !errors.Is(err, endorsements.ErrRefused) {
						t.Error(err)
					}
					if _, problems := s.Find(keys...); problems != nil {
						t.Error(problems)
					}
				}
			})
		}
	}
	group.Wait()
	if good, bad := list(t, open(t, dir)); len(good) != 15 || len(bad) > 0 {
		t.Errorf("%q, %q", good, bad)
	}
}

// BenchmarkFind is what a release pays for the store: a certificate, its issuer and a revocation list.
func BenchmarkFind(b *testing.B) {
	a, s := testAuthority(b)
	crl, err := a.CRL(time.Now(), time.Now().AddDate(1, 0, 0))
	if err != nil {
		b.Fatal(err)
	}
	k, err := a.Issue(snptest.Template{Kind: attest.VCEK, HWID: bytes.Repeat([]byte{7}, 64)})
	if err != nil {
		b.Fatal(err)
	}
	put(b, s, attest.Endorsements{Certificates: [][]byte{k.DER, a.ASK.Raw}, CRLs: [][]byte{crl}})
	key := snp.Key{Kind: attest.VCEK, Line: snp.Milan, Chip: bytes.Repeat([]byte{7}, 64)}
	for b.Loop() {
		if found, problems := s.Find(key); len(found.Certificates) != 2 || len(found.CRLs) != 1 || problems != nil {
			b.Fatal(problems)
		}
	}
}
