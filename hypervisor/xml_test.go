package hypervisor

import (
	"bytes"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// liveXML is what libvirt gives of a running domain, shortened.
const liveXML = `<?xml version="1.0" encoding="UTF-8"?>
<!-- written by libvirt -->
<domain type='kvm' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web1</name>
  <uuid>11111111-2222-3333-4444-555555555555</uuid>
  <metadata>
    <app1:home xmlns:app1="http://example.org/app"><name>not mine</name><cid address='9'/></app1:home>
    <keybroker:domain xmlns:keybroker="urn:keybroker:domain:1">
      <keybroker:key name="disk"/>
      <!-- a comment --><keybroker:key name="app"></keybroker:key>
    </keybroker:domain>
  </metadata>
  <memory unit='KiB'>262144</memory>
  <devices>
    <disk type='file'><source file='/x&amp;y'/><name>disk name</name></disk>
    <vsock model='virtio'><cid auto='yes' address='42'/><alias name='vsock0'/></vsock>
  </devices>
  <seclabel type='none'/>
</domain>
`

func TestParseDomain(t *testing.T) {
	got, err := ParseDomain([]byte(liveXML))
	if err != nil {
		t.Fatal(err)
	}
	want := Domain{UUID: testUUID, Name: "web1", CID: 42, Offered: []string{"disk", "app"}, Metadata: true}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// domainXML puts together a definition from what goes into the metadata and the devices.
func domainXML(metadata, devices string) string {
	return "<domain><name>web1</name><uuid>" + testUUID + "</uuid><metadata>" + metadata + "</metadata><devices>" + devices + "</devices></domain>"
}

func ourXML(inner string) string {
	return `<k:domain xmlns:k="` + Namespace + `">` + inner + `</k:domain>`
}

func TestParseDomainVariants(t *testing.T) {
	plain := Domain{UUID: testUUID, Name: "web1"}
	with := func(f func(*Domain)) Domain { d := plain; f(&d); return d }
	cases := map[string]struct {
		xml  string
		want Domain
	}{
		"nothing of ours":         {domainXML("", ""), plain},
		"no metadata, no devices": {"<domain><uuid>" + strings.ToUpper(testUUID) + "</uuid><name>web1</name></domain>", plain},
		"an element without keys": {domainXML(ourXML(""), ""), with(func(d *Domain) { d.Metadata = true })},
		"no address yet":          {domainXML("", "<vsock><cid auto='yes'/></vsock>"), plain},
		"a vsock without a cid":   {domainXML("", "<vsock model='virtio'/>"), plain},
		"the highest address":     {domainXML("", "<vsock><cid auto='no' address='4294967294'/></vsock>"), with(func(d *Domain) { d.CID = 4294967294 })},
		"a tier":                  {domainXML(`<domain xmlns="`+Namespace+`" tier="snp"><key name="a"/></domain>`, ""), with(func(d *Domain) { d.Metadata, d.Tier, d.Offered = true, "snp", []string{"a"} })},
		"namespace in a comment":  {domainXML("<!-- "+Namespace+" -->", ""), plain},
		"a name with markup":      {strings.Replace(domainXML("", ""), "web1", "w&lt;&#233;, &quot;1", 1), with(func(d *Domain) { d.Name = "w<é, \"1" })},
	}
	for title, c := range cases {
		got, err := ParseDomain([]byte(c.xml))
		if err != nil {
			t.Errorf("%s: %v", title, err)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: %s", title, diff)
		}
	}
}

func manyKeys(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `<k:key name="k%d"/>`, i)
	}
	return b.String()
}

var badXML = map[string]string{
	"empty":                         "",
	"no markup":                     "hello",
	"another root":                  "<network><name>web1</name></network>",
	"cut":                           liveXML[:len(liveXML)/2],
	"two roots":                     domainXML("", "") + domainXML("", ""),
	"text behind":                   domainXML("", "") + "x",
	"a document type":               "<!DOCTYPE domain>" + domainXML("", ""),
	"an entity bomb":                `<!DOCTYPE d [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>` + strings.Replace(domainXML("", ""), "web1", "&b;", 1),
	"an entity of its own":          strings.Replace(domainXML("", ""), "web1", "&web;", 1),
	"another encoding":              `<?xml version="1.0" encoding="ISO-8859-1"?>` + domainXML("", ""),
	"bad UTF-8":                     strings.Replace(domainXML("", ""), "web1", "\xff", 1),
	"no name":                       "<domain><uuid>" + testUUID + "</uuid></domain>",
	"no UUID":                       "<domain><name>web1</name></domain>",
	"two names":                     strings.Replace(domainXML("", ""), "<uuid>", "<name>web2</name><uuid>", 1),
	"an empty name":                 strings.Replace(domainXML("", ""), "web1", "", 1),
	"a name with a slash":           strings.Replace(domainXML("", ""), "web1", "../web1", 1),
	"a name of two lines":           strings.Replace(domainXML("", ""), "web1", "web&#10;1", 1),
	"a long name":                   strings.Replace(domainXML("", ""), "web1", strings.Repeat("w", 252), 1),
	"a huge name":                   strings.Replace(domainXML("", ""), "web1", strings.Repeat("w", 9999), 1),
	"an element in the name":        strings.Replace(domainXML("", ""), "web1", "<b>web1</b>", 1),
	"a UUID that is none":           strings.Replace(domainXML("", ""), testUUID, "11111111222233334444555555555555", 1),
	"a UUID of zeros":               strings.Replace(domainXML("", ""), testUUID, "00000000-0000-0000-0000-000000000000", 1),
	"a UUID of other digits":        strings.Replace(domainXML("", ""), testUUID, "1111111g-2222-3333-4444-555555555555", 1),
	"two CIDs":                      domainXML("", "<vsock><cid address='3'/><cid address='4'/></vsock>"),
	"two vsock devices":             domainXML("", "<vsock><cid address='3'/></vsock><vsock><cid address='4'/></vsock>"),
	"two addresses of one CID":      domainXML("", "<vsock><cid address='3' address='4'/></vsock>"),
	"the host's CID":                domainXML("", "<vsock><cid address='2'/></vsock>"),
	"CID 0":                         domainXML("", "<vsock><cid address='0'/></vsock>"),
	"any CID":                       domainXML("", "<vsock><cid address='4294967295'/></vsock>"),
	"a CID of 33 bits":              domainXML("", "<vsock><cid address='4294967299'/></vsock>"),
	"a negative CID":                domainXML("", "<vsock><cid address='-3'/></vsock>"),
	"a CID in hexadecimal":          domainXML("", "<vsock><cid address='0x2a'/></vsock>"),
	"two of our elements":           domainXML(ourXML("")+ourXML(""), ""),
	"an unknown one of ours":        domainXML(ourXML("<k:sink name='luks'/>"), ""),
	"ours in a foreign place":       domainXML("<a>"+ourXML("")+"</a>", ""),
	"a foreign element in ours":     domainXML(ourXML("<key name='disk'/>"), ""),
	"text in ours":                  domainXML(ourXML("disk"), ""),
	"an unknown attribute":          domainXML(ourXML("<k:key name='disk' device='/dev/vdb'/>"), ""),
	"a foreign attribute":           domainXML(ourXML("<k:key k:name='disk'/>"), ""),
	"a key without a name":          domainXML(ourXML("<k:key/>"), ""),
	"a key that is not a name":      domainXML(ourXML("<k:key name='Disk'/>"), ""),
	"a key that ends in a dot":      domainXML(ourXML("<k:key name='disk.'/>"), ""),
	"a long key":                    domainXML(ourXML("<k:key name='"+strings.Repeat("k", 64)+"'/>"), ""),
	"a key twice":                   domainXML(ourXML("<k:key name='disk'/><k:key name='disk'/>"), ""),
	"65 keys":                       domainXML(ourXML(manyKeys(65)), ""),
	"an unknown tier":               domainXML(`<domain xmlns="`+Namespace+`" tier="service"/>`, ""),
	"deeper than needed":            domainXML(strings.Repeat("<a>", 70)+strings.Repeat("</a>", 70), ""),
	"more than a mebioctet":         domainXML("<!--"+strings.Repeat("x", MaxDomainXML)+"-->", ""),
	"a depth of a hundred thousand": strings.Repeat("<a>", 100000),
}

func TestParseDomainRefuses(t *testing.T) {
	for title, data := range badXML {
		d, err := ParseDomain([]byte(data))
		if err == nil {
			t.Errorf("%s: taken", title)
			continue
		}
		if diff := cmp.Diff(Domain{}, d); diff != "" {
			t.Errorf("%s: an error and a domain: %s", title, diff)
		}
		if len(err.Error()) > 400 || strings.ContainsAny(err.Error(), "\n\x00") {
			t.Errorf("%s: the error is no short line: %q", title, err)
		}
	}
}

// As many keys as are allowed are taken.
func TestParseDomain64Keys(t *testing.T) {
	d, err := ParseDomain([]byte(domainXML(ourXML(manyKeys(MaxOffered)), "")))
	if err != nil || len(d.Offered) != MaxOffered {
		t.Errorf("%d keys, %v", len(d.Offered), err)
	}
}

// A domain whose metadata is wrong still has its address, and nobody else has it.
func TestParseCIDIgnoresMetadata(t *testing.T) {
	cid, err := ParseCID([]byte(domainXML(ourXML("<k:nonsense>x</k:nonsense><k:key name='BAD' x='y'/>"), "<vsock><cid address='77'/></vsock>")))
	if err != nil || cid != 77 {
		t.Errorf("CID %d, %v", cid, err)
	}
	if _, err := ParseCID([]byte(badXML["two CIDs"])); err == nil {
		t.Error("two CIDs are taken for one")
	}
}

// The largest and most tangled input that is looked at takes a bounded time.
func TestParseDomainIsLinear(t *testing.T) {
	for title, unit := range map[string]string{"elements": "<a/>", "attributes": "", "namespaces": `<a xmlns:b="c"/>`, "references": "&#65;", "levels": strings.Repeat("<a>", 50) + strings.Repeat("</a>", 50)} {
		inner := strings.Repeat(unit, (MaxDomainXML-1000)/max(len(unit), 1))
		if unit == "" {
			inner = "<a" + strings.Repeat(" b='c'", (MaxDomainXML-1000)/6) + "/>"
		}
		begin := ownCPU(t)
		if _, err := ParseDomain([]byte(domainXML(inner, ""))); err != nil {
			t.Errorf("%s: %v", title, err)
		}
		if took := ownCPU(t) - begin; took > 5*time.Second {
			t.Errorf("%s: took %v", title, took)
		}
	}
}

// ownCPU is how long this process has had a processor, however busy the machine is.
func ownCPU(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// FuzzParseDomain: what is taken keeps to the bounds, an error leaves nothing, and a domain written out from what was read
// reads the same.
func FuzzParseDomain(f *testing.F) {
	f.Add([]byte(liveXML))
	for _, data := range badXML {
		if len(data) < 10000 {
			f.Add([]byte(data))
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := ParseDomain(data)
		cid, cidErr := ParseCID(data)
		if err != nil {
			if diff := cmp.Diff(Domain{}, d); diff != "" {
				t.Fatalf("an error and a domain: %s", diff)
			}
			return
		}
		if cidErr != nil || cid != d.CID {
			t.Fatalf("CID %d and %d, %v", d.CID, cid, cidErr)
		}
		back, err := ParseDomain(writeDomain(d))
		if err != nil {
			t.Fatalf("%v: %s", err, writeDomain(d))
		}
		if diff := cmp.Diff(d, back); diff != "" {
			t.Fatal(diff)
		}
		if d.Metadata && !bytes.Contains(data, []byte("domain")) {
			t.Fatal("metadata from nowhere")
		}
		if e := (HookEvent{Operation: OpPrepare, UUID: d.UUID, Name: d.Name, CID: d.CID, Tier: d.Tier, Offered: d.Offered}); e.check() != nil {
			t.Fatalf("a domain that no hook event can tell of: %v", e.check())
		}
	})
}

// writeDomain is the inverse of ParseDomain.
func writeDomain(d Domain) []byte {
	var b bytes.Buffer
	escape := strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;")
	fmt.Fprintf(&b, "<domain><name>%s</name><uuid>%s</uuid>", escape.Replace(d.Name), d.UUID)
	if d.Metadata {
		fmt.Fprintf(&b, `<metadata><domain xmlns="%s" tier="%s">`, Namespace, d.Tier)
		for _, k := range d.Offered {
			fmt.Fprintf(&b, `<key name="%s"/>`, k)
		}
		b.WriteString("</domain></metadata>")
	}
	if d.CID != 0 {
		fmt.Fprintf(&b, "<devices><vsock><cid address='%d'/></vsock></devices>", d.CID)
	}
	b.WriteString("</domain>")
	return b.Bytes()
}
